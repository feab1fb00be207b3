//! A snapshot as it is recorded, shown and given to programs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    ByteSize, DiskName, Fingerprint, ImageFormat, InternalRecord, MemoryRecord, Name, PlatformFile,
    SnapshotId,
};

/// Most labels that one snapshot carries.
pub const MAX_LABELS: usize = 64;

/// Whether the guest's file systems are frozen while the point is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quiesce {
    /// No freeze; the point is crash-consistent.
    Off,
    /// Freeze if the guest can; otherwise take a crash-consistent point and say so.
    Try,
    /// Freeze, or take nothing.
    Require,
}

impl FromStr for Quiesce {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            "try" => Ok(Self::Try),
            "require" => Ok(Self::Require),
            _ => Err(format!("{text:?} is not one of require, try, off")),
        }
    }
}

/// What a guest finds when it starts from the point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// As after a power cut: every disk at the same instant, journals to be replayed.
    Crash,
    /// Every file system that the agent knows was synced and frozen; no replay.
    Filesystem,
    /// As `Filesystem`, and the guest's applications took part (Windows VSS writers, freeze hooks).
    Application,
}

impl Consistency {
    /// The word for it in tables and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::Filesystem => "filesystem",
            Self::Application => "application",
        }
    }
}

/// What the freeze of one point was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FreezeReport {
    /// File systems that the agent said it froze.
    pub filesystems: u64,
    /// The mount points that were asked for; every file system if empty.
    pub mountpoints: Vec<String>,
    /// Seconds from the moment the freeze command was sent to the moment the thaw was confirmed.
    pub window: f64,
    /// Of these, seconds until the guest confirmed the freeze: it was writing out what was dirty.
    pub freezing: f64,
    /// Seconds that QEMU took to switch every disk to its overlay.
    pub switching: f64,
    /// Seconds until the guest confirmed the thaw.
    pub thawing: f64,
}

/// How a copy of a disk was made that shares its data with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CopyMethod {
    /// Files share extents (`FICLONE`).
    Reflink,
    /// Thin volumes of LVM share blocks.
    Thin,
}

impl CopyMethod {
    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reflink => "reflink",
            Self::Thin => "thin",
        }
    }
}

/// One disk's part of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// The disk, as the user knows it.
    pub disk: DiskName,
    /// The image that holds the point: the active layer until then, frozen since.
    pub path: PathBuf,
    /// The format of `path`.
    pub format: ImageFormat,
    /// The layer in which the disk went on: the overlay that took its place, or the image of which `path` is a copy.
    pub overlay: PathBuf,
    /// How `path` was made, where it is a copy beside the active layer: that stayed what it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copied: Option<CopyMethod>,
    /// The size that the guest sees, in bytes.
    pub virtual_size: ByteSize,
    /// Permission bits of `path` before it was sealed, or none where it was not sealed.
    pub sealed_mode: Option<u32>,
    /// The snapshot on which `path` stands, if any: that of one disk may be another than that of the next, once one of
    /// them was reverted or flattened. [`crate::History::enter`] sets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    /// When `path` was changed rightfully after the point, if it was: layers were merged into it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<Timestamp>,
    /// The id of QEMU's object that holds the key, where `path` is encrypted. Never the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_secret: Option<String>,
    /// What `path` was when it was sealed, as far as it could be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<Fingerprint>,
}

/// One point in time of one VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Its id for life.
    pub id: SnapshotId,
    /// The VM's name at the time.
    pub vm: Name,
    /// The user's or a generated name, unique within the VM.
    pub name: Name,
    /// When the point was made.
    pub created: Timestamp,
    /// What the user wrote about it.
    pub description: Option<String>,
    /// The user's marks on it.
    pub labels: BTreeMap<String, String>,
    /// What a guest finds when it starts from the point.
    pub consistency: Consistency,
    /// The freeze, where there was one.
    pub freeze: Option<FreezeReport>,
    /// The disks, in the order in which QEMU lists them.
    pub disks: Vec<LayerRecord>,
    /// Where it is, if it lies inside the images: it has no layers then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub internal: Option<InternalRecord>,
    /// The memory at the same instant, if it was saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryRecord>,
    /// Copies of the firmware's variables and the TPM's state, if the VM has them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub platform: Vec<PlatformFile>,
    /// The snapshot that came before on the active chain, if any.
    pub parent: Option<SnapshotId>,
    /// When it was deleted, for one whose layers are not merged yet. Users see it no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted: Option<Timestamp>,
    /// Whether the user keeps it from being deleted and pruned.
    #[serde(default)]
    pub protected: bool,
}

impl LayerRecord {
    /// A layer that nothing more is known of.
    pub fn new(
        disk: DiskName,
        path: PathBuf,
        format: ImageFormat,
        overlay: PathBuf,
        virtual_size: ByteSize,
    ) -> Self {
        Self {
            disk,
            path,
            format,
            overlay,
            copied: None,
            virtual_size,
            sealed_mode: None,
            parent: None,
            changed: None,
            key_secret: None,
            fingerprint: None,
        }
    }

    /// The layer that the guest wrote to when the point was made.
    pub fn was_active(&self) -> &Path {
        if self.copied.is_some() { &self.overlay } else { &self.path }
    }
}

impl SnapshotRecord {
    /// A crash-consistent point that holds no disk yet and stands on nothing.
    pub fn new(id: SnapshotId, vm: Name, name: Name, created: Timestamp) -> Self {
        Self {
            id,
            vm,
            name,
            created,
            description: None,
            labels: BTreeMap::new(),
            consistency: Consistency::Crash,
            freeze: None,
            disks: Vec::new(),
            internal: None,
            memory: None,
            platform: Vec::new(),
            parent: None,
            deleted: None,
            protected: false,
        }
    }
}
