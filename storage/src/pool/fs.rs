//! `fs`: a file system on a partition, a disk or in a loop image, which the pool mounts and unmounts.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use host::Error as HostError;
use host::files::parent;
use host::open_files;
use host::program::Program;
use model::Name;
use serde::{Deserialize, Serialize};
use toml::Table;

use super::files::{FilePlace, FilePool, Files, Layout};
use super::{Changed, Kind, Opened, PoolError, Request, mark, wrong_place};

pub(super) const KIND: Kind = Kind {
    name: "fs",
    about: "a formatted partition, disk or loop image, which the pool mounts",
    options: &["source", "path"],
    programs: &["qemu-img", "blkid", "mount", "umount"],
    define,
    open,
};

/// Volumes are data: nothing in there is run, no device opened.
const MOUNT_OPTIONS: &str = "nosuid,nodev,noexec";
/// Nobody but root looks into a mount point while nothing is mounted.
const EMPTY_MODE: u32 = 0o700;
const THROUGH_MODE: u32 = 0o711;

/// A file system that is known again by its UUID, whatever its device is called today.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Fs {
    /// The device or the loop image.
    source: PathBuf,
    /// Where it is mounted.
    #[serde(default)]
    path: PathBuf,
    #[serde(default)]
    uuid: String,
    #[serde(default)]
    filesystem: String,
}

/// What blkid(8) says is on a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Content {
    uuid: String,
    kind: String,
}

fn define(request: &Request<'_>) -> Result<Table, PoolError> {
    let mut place: Fs = super::options(&KIND, request.pool, request.options.clone())?;
    super::require_absolute(request.pool, &place.source)?;
    let found = content(&place.source)?;
    let Some(found) = found.filter(|found| !found.uuid.is_empty()) else {
        let why = format!("no file system is found on {}; format it first", place.source.display());
        return Err(wrong_place(request.pool, why));
    };
    if place.path.as_os_str().is_empty() {
        place.path = request.mounts.join(request.pool.as_str());
    }
    super::require_absolute(request.pool, &place.path)?;
    super::table(request.pool, &Fs { uuid: found.uuid, filesystem: found.kind, ..place })
}

fn open(pool: &Name, options: Table) -> Opened {
    let place: Fs = super::options(&KIND, pool, options)?;
    let files = Files { pool: pool.clone(), root: place.path.clone(), layout: Layout::Flat };
    Ok(Box::new(FilePool::new(files, place)?))
}

impl FilePlace for Fs {
    fn kind(&self) -> &'static str {
        KIND.name
    }

    fn location(&self, files: &Files) -> String {
        format!("{} on {}", self.source.display(), files.root.display())
    }

    fn ready(&self, files: &Files) -> Result<(), PoolError> {
        if is_mount_point(&files.root) {
            return mark::expect(&files.pool, &files.root, &self.uuid);
        }
        let why = format!("nothing is mounted on {}", files.root.display());
        Err(PoolError::NotStarted { pool: files.pool.clone(), why })
    }

    fn start(&self, files: &Files) -> Result<Changed, PoolError> {
        if is_mount_point(&files.root) {
            return self.ready(files).map(|()| Changed::AlreadySo);
        }
        let source = self.find(files)?;
        make_mount_point(&files.root)?;
        let mut options = MOUNT_OPTIONS.to_owned();
        if source.is_file() {
            options.push_str(",loop");
        }
        let mount = Program::new("mount").args(["-t", self.filesystem.as_str(), "-o", options.as_str()]);
        mount.arg(&source).arg(&files.root).run()?;
        let marked = match mark::read(&files.root) {
            Ok(None) => mark::write(&files.root, &self.uuid),
            Ok(Some(_)) => mark::expect(&files.pool, &files.root, &self.uuid),
            Err(fault) => Err(fault),
        };
        if let Err(fault) = marked {
            unmount(&files.root)?;
            return Err(fault);
        }
        Ok(Changed::Changed)
    }

    fn stop(&self, files: &Files) -> Result<Changed, PoolError> {
        if !is_mount_point(&files.root) {
            return Ok(Changed::AlreadySo);
        }
        self.ready(files)?;
        let user = open_files::user_below(&files.root)?;
        if let Some(by) = user.describe(format_args!("a file below {}", files.root.display())) {
            return Err(PoolError::PoolInUse { pool: files.pool.clone(), by });
        }
        unmount(&files.root)?;
        Ok(Changed::Changed)
    }

    fn forget(&self, files: &Files) -> Result<(), PoolError> {
        match self.ready(files) {
            Ok(()) => mark::remove(&files.root, &self.uuid),
            // What is not mounted keeps its mark, which then says what is true: that it was this pool.
            Err(_) => Ok(()),
        }
    }
}

impl Fs {
    /// The device or image that holds the file system now: the source, or the device to which it moved.
    fn find(&self, files: &Files) -> Result<PathBuf, PoolError> {
        let found = content(&self.source);
        if matches!(&found, Ok(Some(found)) if found.uuid == self.uuid) {
            return Ok(self.source.clone());
        }
        let (status, printed) = Program::new("blkid").args(["-U", self.uuid.as_str()]).outcome()?;
        let moved = PathBuf::from(String::from_utf8_lossy(&printed.stdout).trim());
        if status.success() && moved.is_absolute() {
            return Ok(moved);
        }
        let now = match found {
            Ok(Some(Content { uuid, kind })) => format!("holds {kind} {uuid}"),
            Ok(None) => "holds no file system".into(),
            Err(fault) => format!("cannot be looked at ({fault})"),
        };
        let (source, kind, uuid) = (self.source.display(), &self.filesystem, &self.uuid);
        let why = format!("{source} {now}, and the pool was defined on {kind} {uuid}, which no device holds");
        Err(wrong_place(&files.pool, why))
    }
}

/// Others may pass through the directory of mount points; into an empty one only root may.
fn make_mount_point(path: &Path) -> Result<(), PoolError> {
    for (dir, mode) in [(parent(path), THROUGH_MODE), (path, EMPTY_MODE)] {
        if !dir.is_dir() {
            let made = DirBuilder::new().recursive(true).mode(mode).create(dir);
            made.map_err(HostError::io("make the directory", dir))?;
        }
    }
    Ok(())
}

fn unmount(path: &Path) -> Result<(), PoolError> {
    Program::new("umount").arg(path).run()?;
    Ok(())
}

/// Whether something is mounted on `path` itself.
fn is_mount_point(path: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).ok().map(|metadata| metadata.dev());
    path.is_dir() && device(path) != device(parent(path))
}

/// What is on a device or in a file; none if nothing is known there.
///
/// Source: blkid(8): exit code 2 says that nothing was found, 8 that it is ambiguous.
fn content(source: &Path) -> Result<Option<Content>, PoolError> {
    let kind = fs::metadata(source).map_err(HostError::io("look at", source))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let fault = std::io::Error::other("it is neither a block device nor an image");
        return Err(HostError::io("take a file system from", source)(fault).into());
    }
    let blkid = Program::new("blkid").args(["-p", "-o", "export", "--"]).arg(source);
    let (status, printed) = blkid.outcome()?;
    if !status.success() {
        return Ok(None);
    }
    Ok(Some(parse(&String::from_utf8_lossy(&printed.stdout))))
}

fn parse(text: &str) -> Content {
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_default().to_owned()
    };
    Content { uuid: value("UUID"), kind: value("TYPE") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_blkid_says_is_read() {
        let text = "DEVNAME=/dev/vdb\nUUID=1-2\nUUID_SUB=9\nVERSION=1.0\nBLOCK_SIZE=4096\nTYPE=ext4\nUSAGE=filesystem\n";
        assert_eq!(parse(text), Content { uuid: "1-2".into(), kind: "ext4".into() });
        assert_eq!(parse(""), Content::default());
    }

    #[test]
    fn a_mount_point_is_told_from_a_directory() {
        assert!(is_mount_point(Path::new("/proc")));
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        assert!(!is_mount_point(&inner) && !is_mount_point(Path::new("/does/not/exist")));
    }
}
