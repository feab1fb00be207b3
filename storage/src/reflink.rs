//! Copies that share their data with the original, on file systems that can (XFS, btrfs, bcachefs).

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use host::Error as HostError;
use rustix::fs::{CWD, IFlags, Mode, OFlags, ioctl_getflags, ioctl_setflags, openat};

/// Lets the file `to`, which is there and writable, have the content of `from` without copying it.
///
/// # Errors
/// [`HostError`]: the file system cannot (`EOPNOTSUPP`), the files are on different ones (`EXDEV`), or only one of
/// them is exempt from copy-on-write (`EINVAL`).
///
/// Source: ioctl_ficlone(2).
pub fn clone_onto(from: &Path, to: &Path) -> Result<(), HostError> {
    let source = File::open(from).map_err(HostError::io("open", from))?;
    let target = File::options().write(true).open(to).map_err(HostError::io("open", to))?;
    exempt_like(&source, &target);
    rustix::fs::ioctl_ficlone(&target, &source)
        .map_err(|errno| HostError::io("share the data of", from)(errno.into()))
}

/// On btrfs a file can be exempt from copy-on-write (`chattr +C`); files share data only if both are, or none.
fn exempt_like(source: &File, target: &File) {
    let is_exempt = |file: &File| ioctl_getflags(file).is_ok_and(|flags| flags.contains(IFlags::NOCOW));
    if is_exempt(source) && !is_exempt(target) {
        // It can be set on an empty file only; where it cannot, the clone says so.
        let _ = ioctl_getflags(target).and_then(|flags| ioctl_setflags(target, flags | IFlags::NOCOW));
    }
}

/// Whether files in `dir` can share extents: tried with two files that have no name and are gone at once.
///
/// XFS can be made without it, so that a file system's kind does not tell.
///
/// # Errors
/// [`HostError`] if nothing can be written there.
pub fn is_possible(dir: &Path) -> Result<bool, HostError> {
    let unnamed = || -> io::Result<File> {
        Ok(openat(CWD, dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?
            .into())
    };
    let tried = || -> io::Result<bool> {
        let (mut from, to) = (unnamed()?, unnamed()?);
        from.write_all(&[1; 4096])?;
        Ok(rustix::fs::ioctl_ficlone(&to, &from).is_ok())
    };
    match tried() {
        // A file system that knows no unnamed files knows no shared extents either, as far as they are known here.
        Err(fault) if fault.kind() == io::ErrorKind::Unsupported || fault.raw_os_error() == Some(21) => {
            Ok(false)
        }
        tried => tried.map_err(HostError::io("try to share data in", dir)),
    }
}
