//! Sealing a frozen layer, so that nothing writes to it by mistake: not a VM that is started on the wrong
//! layer, not a tool that takes it for a disk.
//!
//! Two locks, since each alone has a hole. Without write bits, no user but root opens the file for writing.
//! The immutable attribute stops root too, but needs `CAP_LINUX_IMMUTABLE` and a file system that knows it.
//! What a host cannot do is an outcome ([`Immutable::Unsupported`], …), not an error: the layer is then just
//! less protected, and [`Seal`] says how far.
//!
//! An immutable file can be neither removed, renamed nor linked: [`unseal`] comes first.
//!
//! Source: chmod(2); `ioctl_iflags(2)`, `FS_IMMUTABLE_FL` in linux/fs.h.

use std::fs::{File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use host::Error as HostError;
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;
use serde::Serialize;

use crate::file;

/// The write bits of owner, group and others.
const WRITE_BITS: u32 = 0o222;

/// How well a layer is sealed, and what it was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Seal {
    /// Permission bits before; record them for [`unseal`], unless the file was sealed already.
    pub previous_mode: u32,
    /// What became of the write bits.
    pub write_bits: WriteBits,
    /// What became of the immutable attribute.
    pub immutable: Immutable,
}

/// What became of a file's write bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum WriteBits {
    /// They were there and are gone.
    Removed,
    /// There were none.
    AlreadyGone,
    /// It is a block device: the bits are the device node's, and were left alone.
    BlockDevice,
    /// The file belongs to somebody else, or its file system keeps no modes.
    NotPermitted,
}

/// What became of a file's immutable attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Immutable {
    /// It is set now.
    Set,
    /// It was set before.
    AlreadySet,
    /// The file system has no such attribute, or it is a block device.
    Unsupported,
    /// This user may not set it.
    NotPermitted,
}

/// What [`unseal`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unsealed {
    /// The file can be written again.
    Unsealed,
    /// Nothing was sealed: mode and attribute were as they should be.
    AlreadySo,
}

/// How far a file is sealed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SealState {
    /// It has no write bits.
    pub no_write_bits: bool,
    /// It has the immutable attribute.
    pub immutable: bool,
}

impl Seal {
    /// What to record for [`unseal`]: the mode before, or none where nothing was sealed by this call.
    pub fn sealed_mode(&self) -> Option<u32> {
        let changed = self.write_bits == WriteBits::Removed || self.immutable == Immutable::Set;
        changed.then_some(self.previous_mode)
    }
}

impl SealState {
    /// Whether anything keeps somebody from writing.
    pub fn is_sealed(self) -> bool {
        self.no_write_bits || self.immutable
    }
}

/// Takes the write bits from `path` and makes it immutable, as far as this host can.
///
/// Whoever has it open for writing keeps writing where the file system allows that: seal what QEMU has
/// reopened read-only.
///
/// # Errors
/// [`HostError`] if it is neither a regular file nor a block device, or cannot be opened, or the system
/// fails in another way than by not supporting or not permitting it.
pub fn seal(path: &Path) -> Result<Seal, HostError> {
    let opened = file::open(path)?;
    let previous_mode = opened.metadata.mode() & 0o7777;
    if !opened.metadata.is_file() {
        let (write_bits, immutable) = (WriteBits::BlockDevice, Immutable::Unsupported);
        return Ok(Seal { previous_mode, write_bits, immutable });
    }
    // First the bits: they cannot be changed any more once the file is immutable.
    let write_bits = remove_write_bits(&opened.file, previous_mode, path)?;
    let immutable = make_immutable(&opened.file, path)?;
    Ok(Seal { previous_mode, write_bits, immutable })
}

/// Undoes [`seal`]: takes the immutable attribute away and sets the mode to `previous_mode`.
///
/// # Errors
/// [`HostError`] if this user may not (only root takes the attribute away), or as for [`seal`].
pub fn unseal(path: &Path, previous_mode: u32) -> Result<Unsealed, HostError> {
    let opened = file::open(path)?;
    if !opened.metadata.is_file() {
        return Ok(Unsealed::AlreadySo);
    }
    let mut outcome = Unsealed::AlreadySo;
    if let Some(flags) = flags(&opened.file, path)?
        && flags.contains(IFlags::IMMUTABLE)
    {
        ioctl_setflags(&opened.file, flags - IFlags::IMMUTABLE)
            .map_err(|errno| HostError::io("take the immutable attribute from", path)(errno.into()))?;
        outcome = Unsealed::Unsealed;
    }
    if opened.metadata.mode() & 0o7777 != previous_mode & 0o7777 {
        let mode = Permissions::from_mode(previous_mode & 0o7777);
        opened.file.set_permissions(mode).map_err(HostError::io("set the mode of", path))?;
        outcome = Unsealed::Unsealed;
    }
    Ok(outcome)
}

/// Returns how far `path` is sealed now. A block device is not sealed.
///
/// # Errors
/// [`HostError`] if it cannot be opened or looked at.
pub fn state(path: &Path) -> Result<SealState, HostError> {
    let opened = file::open(path)?;
    if !opened.metadata.is_file() {
        return Ok(SealState { no_write_bits: false, immutable: false });
    }
    let immutable = flags(&opened.file, path)?.is_some_and(|flags| flags.contains(IFlags::IMMUTABLE));
    Ok(SealState { no_write_bits: opened.metadata.mode() & WRITE_BITS == 0, immutable })
}

/// Whether anything keeps somebody from writing to `path`.
///
/// # Errors
/// As [`state`].
pub fn is_sealed(path: &Path) -> Result<bool, HostError> {
    state(path).map(SealState::is_sealed)
}

fn remove_write_bits(file: &File, mode: u32, path: &Path) -> Result<WriteBits, HostError> {
    if mode & WRITE_BITS == 0 {
        return Ok(WriteBits::AlreadyGone);
    }
    match rustix::fs::fchmod(file, (mode & !WRITE_BITS).into()) {
        Ok(()) => {}
        // ENOTSUP, EPERM: not the owner, an immutable file, or a file system without modes (vfat, some FUSE).
        Err(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP | Errno::ROFS) => {
            return Ok(WriteBits::NotPermitted);
        }
        Err(errno) => return Err(HostError::io("take the write bits from", path)(errno.into())),
    }
    // Some file systems say yes and keep the bits.
    let now = file.metadata().map_err(HostError::io("look at", path))?.mode();
    Ok(if now & WRITE_BITS == 0 { WriteBits::Removed } else { WriteBits::NotPermitted })
}

fn make_immutable(file: &File, path: &Path) -> Result<Immutable, HostError> {
    let Some(flags) = flags(file, path)? else { return Ok(Immutable::Unsupported) };
    if flags.contains(IFlags::IMMUTABLE) {
        return Ok(Immutable::AlreadySet);
    }
    match ioctl_setflags(file, flags | IFlags::IMMUTABLE) {
        Ok(()) => Ok(Immutable::Set),
        Err(Errno::PERM | Errno::ACCESS | Errno::ROFS) => Ok(Immutable::NotPermitted),
        Err(errno) if is_unsupported(errno) => Ok(Immutable::Unsupported),
        Err(errno) => Err(HostError::io("make immutable", path)(errno.into())),
    }
}

/// The file's attributes, or none where its file system has none.
fn flags(file: &File, path: &Path) -> Result<Option<IFlags>, HostError> {
    match ioctl_getflags(file) {
        Ok(flags) => Ok(Some(flags)),
        Err(errno) if is_unsupported(errno) => Ok(None),
        Err(errno) => Err(HostError::io("read the attributes of", path)(errno.into())),
    }
}

fn is_unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::NOTTY | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL)
}
