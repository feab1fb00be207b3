//! Sizes in bytes, read and written in IEC units.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A size in bytes. Text is IEC (`20G` is 20 × 2³⁰ bytes); JSON is the number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

/// Why a text is no [`ByteSize`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseSizeError {
    /// Not a number with an optional unit.
    #[error("{0:?} is not a size; write a whole number with K, M, G or T, for example 20G")]
    Malformed(String),
    /// More than 2⁶⁴ − 1 bytes.
    #[error("{0:?} is larger than any disk can be")]
    TooLarge(String),
}

const UNITS: [(&str, u64); 5] =
    [("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30), ("T", 1 << 40), ("P", 1 << 50)];

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        let malformed = || ParseSizeError::Malformed(text.to_owned());
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(malformed());
        }
        let unit = unit.trim_start().to_ascii_uppercase();
        let letter = unit.strip_suffix("IB").or_else(|| unit.strip_suffix('B')).unwrap_or(&unit);
        let factor = match letter {
            "" if unit != "IB" => 1,
            _ => UNITS.iter().find(|(name, _)| *name == letter).ok_or_else(malformed)?.1,
        };
        let too_large = || ParseSizeError::TooLarge(text.to_owned());
        let number: u64 = number.parse().map_err(|_| too_large())?;
        number.checked_mul(factor).map(Self).ok_or_else(too_large)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match UNITS.iter().rev().find(|(_, factor)| self.0 >= *factor) {
            None => format!("{} B", self.0),
            Some((unit, factor)) => {
                // Tenths are enough to tell disks apart; integers keep it exact for whole units.
                let tenths = (u128::from(self.0) * 10 + u128::from(*factor) / 2) / u128::from(*factor);
                match tenths % 10 {
                    0 => format!("{} {unit}iB", tenths / 10),
                    rest => format!("{}.{rest} {unit}iB", tenths / 10),
                }
            }
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_iec_units() {
        for (text, bytes) in [("0", 0), ("512", 512), ("20G", 20 << 30), ("1KiB", 1024), ("3 MB", 3 << 20)] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for bad in ["", "G", "1.5G", "-1", "1X", "1iB", "1GG"] {
            assert!(matches!(bad.parse::<ByteSize>(), Err(ParseSizeError::Malformed(_))), "{bad}");
        }
        assert!(matches!("99999999P".parse::<ByteSize>(), Err(ParseSizeError::TooLarge(_))));
    }

    #[test]
    fn writes_one_decimal_at_most() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1 << 20, "1 MiB"),
            (196_608, "192 KiB"),
            (1_610_612_736, "1.5 GiB"),
        ] {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
        assert_eq!(ByteSize(u64::MAX).to_string(), "16384 PiB");
    }
}
