//! Names that users give to VMs, snapshots, pools and networks.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name in bytes.
pub const MAX_NAME_LEN: usize = 64;

/// A name of a VM, snapshot, pool, network or repository: `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
///
/// It can be a file name as it is: it holds no `/`, is never empty and never starts with a dot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Why a text is no [`Name`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseNameError {
    /// The text is empty.
    #[error("a name cannot be empty")]
    Empty,
    /// The text has more than [`MAX_NAME_LEN`] bytes.
    #[error("the name is {0} bytes long; at most {MAX_NAME_LEN} are allowed")]
    TooLong(usize),
    /// The first character is not a letter or a digit.
    #[error("the name {0:?} does not start with a letter or a digit (A-Z, a-z, 0-9)")]
    BadStart(String),
    /// A later character is not allowed.
    #[error("the name {name:?} holds {character:?}; letters, digits, '.', '_' and '-' are allowed")]
    BadCharacter {
        /// The whole text.
        name: String,
        /// The first character that is not allowed.
        character: char,
    },
}

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, ParseNameError> {
        let first = text.chars().next().ok_or(ParseNameError::Empty)?;
        if text.len() > MAX_NAME_LEN {
            return Err(ParseNameError::TooLong(text.len()));
        }
        if !first.is_ascii_alphanumeric() {
            return Err(ParseNameError::BadStart(text.to_owned()));
        }
        match text.chars().find(|c| !c.is_ascii_alphanumeric() && !"._-".contains(*c)) {
            Some(character) => Err(ParseNameError::BadCharacter { name: text.to_owned(), character }),
            None => Ok(Self(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Name {
    type Error = ParseNameError;

    fn try_from(text: String) -> Result<Self, ParseNameError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_the_grammar_allows() {
        for good in ["a", "vm1", "9lives", "a.b_c-d", &"x".repeat(64)] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn names_the_first_fault() {
        assert_eq!("".parse::<Name>(), Err(ParseNameError::Empty));
        assert_eq!("x".repeat(65).parse::<Name>(), Err(ParseNameError::TooLong(65)));
        for bad in [".hidden", "-x", "_a", "é", "../up"] {
            assert!(matches!(bad.parse::<Name>(), Err(ParseNameError::BadStart(_))), "{bad}");
        }
        for (bad, at) in [("a/b", '/'), ("a b", ' '), ("a\u{1b}[2J", '\u{1b}'), ("aé", 'é')] {
            let fault = bad.parse::<Name>().unwrap_err();
            assert_eq!(fault, ParseNameError::BadCharacter { name: bad.into(), character: at });
        }
    }
}
