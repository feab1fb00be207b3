//! What a VM keeps beside its disks, as it was at a snapshot.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What a file of the platform is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlatformKind {
    /// The firmware's variables.
    Nvram,
    /// The state of a software TPM.
    Tpm,
}

impl PlatformKind {
    /// The word for it in tables and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nvram => "nvram",
            Self::Tpm => "tpm",
        }
    }
}

/// One file of the platform, and its copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformFile {
    /// What it is.
    pub kind: PlatformKind,
    /// The file that the VM uses.
    pub live: PathBuf,
    /// What was in it.
    pub copy: PathBuf,
}
