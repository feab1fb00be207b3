//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An Ethernet address of one NIC: never a group address, never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

/// The text is no address that a NIC can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseMacAddressError {
    /// Not six pairs of hexadecimal digits.
    #[error("{0:?} is no MAC address; write for example 52:54:00:11:22:33")]
    Malformed(String),
    /// The address of a group, or of nobody.
    #[error("{0:?} is the address of a group or of nobody; a NIC needs one of its own")]
    NotANic(String),
}

impl MacAddress {
    /// An address with the prefix that QEMU and libvirt give to guests' NICs.
    pub const fn of_qemu([a, b, c]: [u8; 3]) -> Self {
        Self([0x52, 0x54, 0x00, a, b, c])
    }

    /// The six bytes, in the order in which they are sent.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddress {
    type Err = ParseMacAddressError;

    fn from_str(text: &str) -> Result<Self, ParseMacAddressError> {
        let malformed = || ParseMacAddressError::Malformed(text.to_owned());
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().filter(|pair| pair.len() == 2 && !pair.starts_with('+'));
            *byte = pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()).ok_or_else(malformed)?;
        }
        if pairs.next().is_some() {
            return Err(malformed());
        }
        // The lowest bit of the first byte marks groups (IEEE 802.3).
        match bytes[0] & 1 == 1 || bytes == [0; 6] {
            true => Err(ParseMacAddressError::NotANic(text.to_owned())),
            false => Ok(Self(bytes)),
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl TryFrom<String> for MacAddress {
    type Error = ParseMacAddressError;

    fn try_from(text: String) -> Result<Self, ParseMacAddressError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        let mac: MacAddress = "52:54:00:AA:bb:33".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:aa:bb:33");
        for bad in [
            "",
            "52:54:00:11:22",
            "52:54:00:11:22:33:44",
            "52-54-00-11-22-33",
            "52:54:00:11:22:+3",
            "g2:54:00:11:22:33",
        ] {
            assert!(matches!(bad.parse::<MacAddress>(), Err(ParseMacAddressError::Malformed(_))), "{bad}");
        }
        for group in ["ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "00:00:00:00:00:00"] {
            assert!(matches!(group.parse::<MacAddress>(), Err(ParseMacAddressError::NotANic(_))), "{group}");
        }
    }
}
