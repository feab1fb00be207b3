//! Identifiers that snapctl makes: short enough to type, long enough never to meet.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is no identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an id: 16 hexadecimal digits are expected")]
pub struct ParseIdError(String);

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(u64);

        impl $name {
            /// Makes the id of 64 random bits.
            pub const fn from_bits(bits: u64) -> Self {
                Self(bits)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&format!("{:016x}", self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let fault = || ParseIdError(text.to_owned());
                if text.len() != 16 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(fault());
                }
                u64::from_str_radix(text, 16).map(Self).map_err(|_| fault())
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseIdError;

            fn try_from(text: String) -> Result<Self, ParseIdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }
    };
}

id!(
    /// One snapshot, for life. Written as 16 hexadecimal digits.
    SnapshotId
);
id!(
    /// One operation in the journal. Its digits are part of every file, node and job that it makes, so
    /// that recovery knows its own.
    OperationId
);

impl OperationId {
    /// Digits of [`OperationId::tag`].
    pub const TAG_DIGITS: usize = 8;

    /// The first digits: enough to tell the files, nodes and jobs of two operations apart, and short, since QEMU takes
    /// some 3 µs for each byte that it is sent.
    pub fn tag(self) -> String {
        self.to_string().chars().take(Self::TAG_DIGITS).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_text_and_json() {
        let id = SnapshotId::from_bits(0x0123_4567_89ab_cdef);
        assert_eq!(id.to_string(), "0123456789abcdef");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(OperationId::from_bits(0x0123_4567_89ab_cdef).tag(), "01234567");
        assert!("123".parse::<SnapshotId>().is_err());
        assert!("+123456789abcdef".parse::<SnapshotId>().is_err());
    }
}
