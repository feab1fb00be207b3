//! Names of interfaces.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Most bytes of an interface's name: `IFNAMSIZ` of linux/if.h without the zero at its end.
pub const IFNAME_MAX: usize = 15;

/// The name of a network interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IfName(String);

/// The text cannot be the name of an interface.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no name for an interface: 1 to {IFNAME_MAX} of the characters A-Z a-z 0-9 . _ -")]
pub struct ParseIfNameError(pub String);

impl IfName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `prefix` and `name`, or a digest of `name` where that would be too long.
    pub(crate) fn derived(prefix: &str, name: &str) -> Self {
        let whole = format!("{prefix}{name}");
        if let Ok(fits) = whole.parse() {
            return fits;
        }
        let digest = blake3::hash(name.as_bytes()).to_hex();
        let room = IFNAME_MAX - prefix.len();
        Self(format!("{prefix}{}", &digest[..room.min(8)]))
    }
}

impl FromStr for IfName {
    type Err = ParseIfNameError;

    /// Stricter than the kernel, which takes all but slashes, colons and blanks: rules, files and sysctls name it too.
    fn from_str(text: &str) -> Result<Self, ParseIfNameError> {
        let fits = (1..=IFNAME_MAX).contains(&text.len()) && text != "." && text != "..";
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        match fits && !text.starts_with('-') && text.chars().all(plain) {
            true => Ok(Self(text.to_owned())),
            false => Err(ParseIfNameError(text.to_owned())),
        }
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl TryFrom<String> for IfName {
    type Error = ParseIfNameError;

    fn try_from(text: String) -> Result<Self, ParseIfNameError> {
        text.parse()
    }
}

impl From<IfName> for String {
    fn from(name: IfName) -> Self {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_kernel_or_a_rule_would_not_take_are_refused() {
        for good in ["eth0", "br-lan", "bond0.20", "a", "fifteen-bytes.1"] {
            assert_eq!(good.parse::<IfName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "sixteen-bytes.12", "a b", "a/b", "a:b", "-rf", "a\"b", "ä"] {
            assert!(bad.parse::<IfName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_long_name_is_shortened_to_a_digest() {
        assert_eq!(IfName::derived("sbr-", "n1").as_str(), "sbr-n1");
        let long = IfName::derived("sbr-", "a-name-that-is-too-long");
        assert_eq!(long.as_str().len(), 12);
        assert_ne!(long, IfName::derived("sbr-", "a-name-that-is-too-long-too"));
    }
}
