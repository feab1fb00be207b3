//! How much room a directory's file system has.

use std::path::{Path, PathBuf};

use host::Error as HostError;
use model::ByteSize;
use serde::Serialize;

/// New files that must be possible beside the bytes asked for: overlays, their temporaries, a little more.
const INODES_MIN: u64 = 16;

/// There is not enough room, or it cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum SpaceError {
    /// The file system could not be asked.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Too few bytes are free.
    #[error("{} has {available} free, {needed} are needed", dir.display())]
    Bytes {
        /// The directory.
        dir: PathBuf,
        /// What is needed.
        needed: ByteSize,
        /// What this user can still write.
        available: ByteSize,
    },
    /// Too few files can be made.
    #[error("{} has room for {available} more files, {INODES_MIN} are needed", dir.display())]
    Inodes {
        /// The directory.
        dir: PathBuf,
        /// Files that can still be made.
        available: u64,
    },
}

/// The room on one file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Space {
    /// Its size.
    pub total: ByteSize,
    /// What an unprivileged user can still write (`f_bavail`); root can often write a little more.
    pub available: ByteSize,
    /// Files that can still be made; none where the file system sets no limit (btrfs, some FUSE).
    pub inodes: Option<u64>,
}

/// Returns the room on the file system of `dir`.
///
/// Quotas and thin provisioning below the file system are not seen.
///
/// # Errors
/// [`HostError`] if `dir` is not there or its file system does not answer.
///
/// Source: statvfs(3).
pub fn of(dir: &Path) -> Result<Space, HostError> {
    let found = rustix::fs::statvfs(dir)
        .map_err(|errno| HostError::io("take the free space of", dir)(errno.into()))?;
    let bytes = |blocks: u64| ByteSize(blocks.saturating_mul(found.f_frsize));
    Ok(Space {
        total: bytes(found.f_blocks),
        available: bytes(found.f_bavail),
        inodes: (found.f_files > 0).then_some(found.f_favail),
    })
}

/// As [`require`], for a file or device that is to grow by `needed` bytes. A device has all of its room from the start.
///
/// # Errors
/// As [`require`].
pub fn require_for(path: &Path, needed: ByteSize) -> Result<(), SpaceError> {
    if path.starts_with("/dev") {
        return Ok(());
    }
    require(host::files::parent(path), needed).map(drop)
}

/// Makes sure that `needed` bytes can be written in `dir`, and a few files made.
///
/// # Errors
/// [`SpaceError::Bytes`] or [`SpaceError::Inodes`] if not; [`SpaceError::Host`] if it cannot be told.
pub fn require(dir: &Path, needed: ByteSize) -> Result<Space, SpaceError> {
    let space = of(dir)?;
    judge(space, dir, needed).map(|()| space)
}

fn judge(space: Space, dir: &Path, needed: ByteSize) -> Result<(), SpaceError> {
    let dir = || dir.to_owned();
    if space.available < needed {
        return Err(SpaceError::Bytes { dir: dir(), needed, available: space.available });
    }
    match space.inodes {
        Some(available) if available < INODES_MIN => Err(SpaceError::Inodes { dir: dir(), available }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_real_directory_has_room_for_a_byte_and_none_for_all() {
        let dir = tempfile::tempdir().unwrap();
        let space = require(dir.path(), ByteSize(1)).unwrap();
        assert!(space.available <= space.total && space.total.0 > 0);
        let error = require(dir.path(), ByteSize(u64::MAX)).unwrap_err();
        assert!(matches!(error, SpaceError::Bytes { needed: ByteSize(u64::MAX), .. }));
        assert!(error.to_string().contains("are needed"), "{error}");
        assert!(matches!(require(Path::new("/nonexistent"), ByteSize(0)), Err(SpaceError::Host(_))));
    }

    #[test]
    fn no_room_for_files_is_no_room() {
        let space = |inodes| Space { total: ByteSize(10), available: ByteSize(10), inodes };
        let judged = |inodes| judge(space(inodes), Path::new("/x"), ByteSize(10));
        assert!(matches!(judged(Some(15)), Err(SpaceError::Inodes { available: 15, .. })));
        assert!(judged(Some(16)).is_ok() && judged(None).is_ok());
    }
}
