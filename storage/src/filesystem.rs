//! What the file system below an image can do.

use std::fs::File;
use std::path::Path;

use host::Error as HostError;
use rustix::fs::{ioctl_getflags, statfs};
use serde::Serialize;

/// The file system of a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileSystem {
    /// Its name as mount(8) knows it, or its magic number in hexadecimal.
    pub name: String,
    /// Whether its files can be made immutable, so that a sealed layer is safe from root too.
    pub immutable: bool,
    /// Whether its files can share extents, so that a copy costs nothing. XFS can be made without.
    pub reflink: bool,
    /// Whether another host may write to it.
    pub shared: bool,
}

/// A file system by its magic number.
struct Known {
    magic: u64,
    name: &'static str,
    reflink: bool,
    shared: bool,
}

const fn local(magic: u64, name: &'static str) -> Known {
    Known { magic, name, reflink: false, shared: false }
}

const fn reflinking(magic: u64, name: &'static str) -> Known {
    Known { magic, name, reflink: true, shared: false }
}

const fn shared(magic: u64, name: &'static str) -> Known {
    Known { magic, name, reflink: false, shared: true }
}

/// Source: linux/magic.h; statfs(2).
const KNOWN: [Known; 13] = [
    local(0xEF53, "ext4"),
    reflinking(0x5846_5342, "xfs"),
    reflinking(0x9123_683E, "btrfs"),
    reflinking(0xCA45_1A4E, "bcachefs"),
    local(0x0102_1994, "tmpfs"),
    local(0x794C_7630, "overlay"),
    local(0x2FC1_2FC1, "zfs"),
    local(0xF2F5_2010, "f2fs"),
    shared(0x6969, "nfs"),
    shared(0xFF53_4D42, "cifs"),
    shared(0x0116_1970, "gfs2"),
    shared(0x7461_636F, "ocfs2"),
    shared(0x6573_5546, "fuse"),
];

/// Tells what the file system of `dir` can do.
///
/// # Errors
/// [`HostError`] if `dir` is not there or its file system does not answer.
pub fn of(dir: &Path) -> Result<FileSystem, HostError> {
    let found = statfs(dir).map_err(|errno| HostError::io("ask the file system of", dir)(errno.into()))?;
    // The type of the number differs between architectures; its 32 bits do not.
    let magic = (found.f_type as u64) & 0xFFFF_FFFF;
    let known = KNOWN.iter().find(|known| known.magic == magic);
    let handle = File::open(dir).map_err(HostError::io("open", dir))?;
    Ok(FileSystem {
        name: known.map_or_else(|| format!("{magic:#x}"), |known| known.name.to_owned()),
        immutable: ioctl_getflags(&handle).is_ok(),
        reflink: known.is_some_and(|known| known.reflink),
        shared: known.is_some_and(|known| known.shared),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_is_told_by_its_name() {
        let found = of(Path::new("/proc")).unwrap();
        assert_eq!((found.name.as_str(), found.immutable, found.shared), ("0x9fa0", false, false));
        assert!(of(Path::new("/does/not/exist")).is_err());
        let dir = tempfile::tempdir().unwrap();
        let here = of(dir.path()).unwrap();
        // Whatever it is, what it says of sealing has to be what sealing finds.
        let file = dir.path().join("image");
        std::fs::write(&file, "x").unwrap();
        let sealed = crate::seal::seal(&file).unwrap();
        assert_eq!(
            here.immutable,
            sealed.immutable != crate::seal::Immutable::Unsupported,
            "{here:?} {sealed:?}"
        );
        crate::seal::unseal(&file, sealed.previous_mode).unwrap();
    }
}
