//! A snapshot that lies inside the images, with the memory of the same instant.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{ByteSize, DiskName};

/// Where a snapshot is that QEMU keeps inside qcow2 images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InternalRecord {
    /// Its name inside the images.
    pub tag: String,
    /// The images. The first one holds the memory.
    pub disks: Vec<InternalDisk>,
}

/// One disk's part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InternalDisk {
    /// The disk.
    pub disk: DiskName,
    /// The image, which the guest writes to all the time.
    pub path: PathBuf,
    /// What the guest sees.
    pub virtual_size: ByteSize,
}
