//! Copies that share their data with the original, on file systems that can (XFS, btrfs, bcachefs).

use std::fs::File;
use std::path::Path;

use host::Error as HostError;

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
    rustix::fs::ioctl_ficlone(&target, &source)
        .map_err(|errno| HostError::io("share the data of", from)(errno.into()))
}
