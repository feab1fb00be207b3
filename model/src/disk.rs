//! Disks and the formats of their images.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How a user and the catalogue name one disk of a VM: an alias, a qdev id, a `-drive` id or a node-name.
///
/// QEMU's ids are wider than [`crate::Name`] (`#block123` is a node-name), so any text without control
/// characters is allowed; it never becomes a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiskName(String);

impl DiskName {
    /// Takes QEMU's or the user's word for a disk; control characters become `?`, so that a name can be
    /// printed as it is.
    pub fn new(text: &str) -> Self {
        Self(text.chars().map(|c| if c.is_control() { '?' } else { c }).collect())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DiskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// The format of an image. Never probed: it comes from QEMU, from the catalogue or from the user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// Bytes as the guest sees them.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

/// The text is the name of no format that snapctl handles.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no image format that snapctl handles (raw, qcow2)")]
pub struct ParseImageFormatError(pub String);

impl ImageFormat {
    /// The name of QEMU's block driver for it.
    pub const fn driver(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl FromStr for ImageFormat {
    type Err = ParseImageFormatError;

    fn from_str(text: &str) -> Result<Self, ParseImageFormatError> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(ParseImageFormatError(text.to_owned())),
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.driver())
    }
}
