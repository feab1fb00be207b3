//! Opening an image file that is what it seems to be.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use host::Error as HostError;
use model::ByteSize;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

/// Which file it is, whatever its name: device and inode number, as stat(2) gives them.
///
/// It names a file only while that exists: a file system may give the number of a removed file to a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Inode {
    /// `st_dev`.
    pub dev: u64,
    /// `st_ino`.
    pub ino: u64,
}

impl Inode {
    /// The inode that `metadata` is about.
    pub fn of(metadata: &Metadata) -> Self {
        Self { dev: metadata.dev(), ino: metadata.ino() }
    }
}

impl fmt::Display for Inode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "inode {} of device {:#x}", self.ino, self.dev)
    }
}

/// What a file takes on its file system; 0 for a block device.
///
/// Source: stat(2), `st_blocks` counts 512 bytes.
pub fn allocated(metadata: &Metadata) -> ByteSize {
    ByteSize(metadata.blocks().saturating_mul(512))
}

/// The real, absolute path of a file or device: without links, but a device-mapper device by its name, since its number
/// is another one after the next boot.
///
/// # Errors
/// What the system said.
pub fn real_path(path: &Path) -> io::Result<PathBuf> {
    let real = path.canonicalize()?;
    let number = real.strip_prefix("/dev").ok().and_then(Path::to_str).filter(|name| name.starts_with("dm-"));
    let Some(number) = number else { return Ok(real) };
    let name = std::fs::read_to_string(format!("/sys/block/{number}/dm/name"));
    let named = name.map(|name| Path::new("/dev/mapper").join(name.trim_end()));
    Ok(named.ok().filter(|named| named.exists()).unwrap_or(real))
}

/// A regular file or block device, open for reading.
pub(crate) struct Opened {
    pub file: File,
    pub metadata: Metadata,
}

/// Opens `path` for reading if it is a regular file or a block device itself. Never waits (a FIFO without
/// a writer would), never follows a symlink in the last place, but for a device's other names in `/dev`, which are
/// made by udev and LVM.
pub(crate) fn open(path: &Path) -> Result<Opened, HostError> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let device = path.starts_with("/dev").then(|| path.canonicalize().ok()).flatten();
    let path = device.as_deref().filter(|real| real.starts_with("/dev")).unwrap_or(path);
    let opened = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path);
    let file = opened.map_err(name_symlink).map_err(HostError::io("open", path))?;
    let metadata = file.metadata().map_err(HostError::io("look at", path))?;
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(Opened { file, metadata });
    }
    let fault =
        io::Error::new(io::ErrorKind::InvalidInput, "it is neither a regular file nor a block device");
    Err(HostError::io("open", path)(fault))
}

impl Opened {
    /// The size in bytes; for a block device that of the device.
    pub fn size(&mut self, path: &Path) -> Result<u64, HostError> {
        if self.metadata.is_file() {
            return Ok(self.metadata.len());
        }
        self.file.seek(SeekFrom::End(0)).map_err(HostError::io("take the size of", path))
    }
}

/// `ELOOP` reads like a circle of links; with `O_NOFOLLOW` it is one link.
fn name_symlink(error: io::Error) -> io::Error {
    if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) {
        io::Error::new(io::ErrorKind::InvalidInput, "it is a symbolic link, and links are not followed here")
    } else {
        error
    }
}
