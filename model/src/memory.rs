//! The memory of a VM, as it is kept beside a snapshot's disks.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ByteSize;

/// How memory is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryMethod {
    /// The guest runs on while its memory is written: a page that it is about to change is saved before.
    Live,
    /// The guest stands still until all of its memory is written.
    Stop,
}

impl MemoryMethod {
    /// The word for it in tables and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Stop => "stop",
        }
    }
}

impl FromStr for MemoryMethod {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "live" => Ok(Self::Live),
            "stop" => Ok(Self::Stop),
            _ => Err(format!("{text:?} is not one of live, stop")),
        }
    }
}

/// How the bytes of saved memory are to be given to QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryLayout {
    /// A stream, read from its start to its end.
    Stream,
    /// Each page has its place in the file. Source: QEMU docs/devel/migration/mapped-ram.rst.
    MappedRam,
}

/// A device of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Its id.
    pub id: String,
    /// QEMU's name of its kind, for example `virtio-blk-pci`.
    pub driver: String,
}

/// Memory and device state of a VM at a point in time, and what is needed to load them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryRecord {
    /// The file, compressed with zstd.
    pub path: PathBuf,
    /// What it takes.
    pub size: ByteSize,
    /// The memory that the guest had.
    pub ram: ByteSize,
    /// How it was saved.
    pub method: MemoryMethod,
    /// How its bytes are to be read.
    pub layout: MemoryLayout,
    /// Seconds for which the guest stood still, as far as that was seen.
    pub pause: Option<f64>,
    /// The QEMU that it was saved by; one that is as new can load it.
    pub qemu: String,
    /// The machine type, with its version.
    pub machine: String,
    /// The devices that have an id: the QEMU that loads it needs the same ones.
    pub devices: Vec<DeviceRecord>,
}
