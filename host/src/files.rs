//! Files that are whole or not there, after a crash too.
//!
//! | call | after it returned, a power cut leaves | a crash in the middle leaves |
//! | --- | --- | --- |
//! | [`write_durably`] | the new bytes | the old file or the new one, never a mixture |
//! | [`create_durably`] | the new file | no file, or the whole one |
//! | [`remove_durably`] | no file | the file, or none |
//! | [`rename_durably`], [`rename_new_durably`] | the new name | one of the two names |
//!
//! A crash in the middle of a write may also leave a temporary file `.NAME.PID-N.tmp` beside the file.
//! [`remove_temporaries`] clears those away; call it under the lock that guards the file.
//!
//! A failed `fsync` is final: the kernel may have dropped the pages, so it is never tried again on the
//! same file.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{CWD, Mode, OFlags, RenameFlags};

use crate::Error;

/// Longest file name that Linux takes, in bytes (`NAME_MAX`, linux/limits.h).
const NAME_MAX: usize = 255;

/// What a removal found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The file was there and is gone now.
    Removed,
    /// There was no such file.
    AlreadyGone,
}

/// What making a directory found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Made {
    /// It was made now.
    Made,
    /// It was there before, and was left as it is.
    AlreadyThere,
}

/// Replaces `path` by a file of these bytes and permission bits (the umask plays no part).
///
/// A symlink at `path` is replaced, not followed.
///
/// # Errors
/// [`Error::Io`] with the step that failed; the old file then stands as it was, unless the step was the
/// directory's sync: then the new file stands, but a power cut may bring the old one back.
pub fn write_durably(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let temporary = Temporary::write(path, bytes, mode)?;
    fs::rename(&temporary.0, path).map_err(Error::io("replace", path))?;
    temporary.published();
    sync_dir(parent(path))
}

/// Makes `path`, a new file of these bytes and permission bits (the umask plays no part).
///
/// # Errors
/// [`Error::Io`] of kind `AlreadyExists` if anything has that name, be it a dangling symlink; otherwise
/// as [`write_durably`].
pub fn create_durably(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let temporary = Temporary::write(path, bytes, mode)?;
    match rustix::fs::renameat_with(CWD, &temporary.0, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => temporary.published(),
        // Not every file system knows the flag (NFS, older FUSE); a hard link never replaces either.
        Err(rustix::io::Errno::INVAL) => {
            fs::hard_link(&temporary.0, path).map_err(Error::io("create", path))?;
        }
        Err(errno) => return Err(Error::io("create", path)(errno.into())),
    }
    sync_dir(parent(path))
}

/// Gives `from` the name `to` in the same file system, replacing what was there, and syncs both
/// directories.
///
/// # Errors
/// [`Error::Io`] if the rename or a sync fails.
pub fn rename_durably(from: &Path, to: &Path) -> Result<(), Error> {
    fs::rename(from, to).map_err(Error::io("rename", from))?;
    sync_dir(parent(to))?;
    if parent(from) == parent(to) { Ok(()) } else { sync_dir(parent(from)) }
}

/// As [`rename_durably`], but never replaces anything.
///
/// # Errors
/// [`Error::Io`] of kind `AlreadyExists` if anything is called `to`; otherwise as [`rename_durably`].
pub fn rename_new_durably(from: &Path, to: &Path) -> Result<(), Error> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        // Not every file system knows the flag (NFS, older FUSE); a hard link never replaces either.
        Err(rustix::io::Errno::INVAL) => {
            fs::hard_link(from, to).map_err(Error::io("name", to))?;
            fs::remove_file(from).map_err(Error::io("remove", from))?;
        }
        Err(errno) => return Err(Error::io("name", to)(errno.into())),
    }
    sync_dir(parent(to))?;
    if parent(from) == parent(to) { Ok(()) } else { sync_dir(parent(from)) }
}

/// Removes the file `path` (a symlink itself, not what it points to).
///
/// # Errors
/// [`Error::Io`] if it is a directory, or is not permitted, or the directory cannot be synced.
pub fn remove_durably(path: &Path) -> Result<Removal, Error> {
    match fs::remove_file(path) {
        Ok(()) => sync_dir(parent(path)).map(|()| Removal::Removed),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Removal::AlreadyGone),
        Err(e) => Err(Error::io("remove", path)(e)),
    }
}

/// Removes what crashed writers of `path` left beside it, and returns how many files that were.
///
/// Call it under the lock that guards `path`: a living writer's temporary file looks the same.
///
/// # Errors
/// [`Error::Io`] if the directory cannot be read or a file in it not removed.
pub fn remove_temporaries(path: &Path) -> Result<usize, Error> {
    let dir = parent(path);
    let prefix = temporary_prefix(path);
    let mut removed = 0;
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let name = entry.map_err(Error::io("list", dir))?.file_name();
        let middle = name.as_bytes().strip_prefix(prefix.as_bytes()).and_then(|n| n.strip_suffix(b".tmp"));
        if middle.is_some_and(|m| m.iter().all(|b| b.is_ascii_digit() || *b == b'-')) {
            remove_durably(&dir.join(name))?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Waits until the file's data and size are on the device.
///
/// # Errors
/// [`Error::Io`] if it cannot be opened, or if anything that was written to it since the last sync did
/// not reach the device.
pub fn sync_file(path: &Path) -> Result<(), Error> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    file.sync_all().map_err(Error::io("sync", path))
}

/// Waits until the directory's entries are on the device: a new, renamed or removed name counts only then.
///
/// A file system that has no sync of directories (`EINVAL`, some FUSE and CIFS) counts as synced.
///
/// # Errors
/// [`Error::Io`] if `path` is no directory, cannot be opened, or did not reach the device.
///
/// Source: fsync(2), "does not necessarily ensure that the entry in the directory … has also reached disk".
pub fn sync_dir(path: &Path) -> Result<(), Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|errno| Error::io("open the directory", path)(errno.into()))?;
    match rustix::fs::fsync(&dir) {
        Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
        Err(errno) => Err(Error::io("sync the directory", path)(errno.into())),
    }
}

/// Makes the directory `path` and its missing parents, all of them 0700.
///
/// # Errors
/// [`Error::Io`] if it cannot be made, or something else has that name.
pub fn make_private_dir(path: &Path) -> Result<Made, Error> {
    if path.is_dir() {
        return Ok(Made::AlreadyThere);
    }
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map(|()| Made::Made).map_err(Error::io("make the directory", path))
}

/// Reads a file of at most `limit` bytes.
///
/// # Errors
/// [`Error::TooLong`] if there are more; [`Error::Io`] if it cannot be read.
pub fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, Error> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::TooLong { path: path.to_owned(), limit });
    }
    Ok(bytes)
}

/// The directory that holds `path`'s name; `.` for a bare name.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        Some(_) => Path::new("."),
        None => path,
    }
}

/// `path` with `ending` behind its last name.
pub fn append(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// A written and synced file that is removed again unless it gets its name.
struct Temporary(PathBuf);

impl Temporary {
    fn write(target: &Path, bytes: &[u8], mode: u32) -> Result<Self, Error> {
        let path = parent(target).join(temporary_name(target));
        // O_EXCL never opens what is there, a symlink included. Narrow first, then as asked for.
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(Error::io("create", &path))?;
        let this = Self(path);
        file.set_permissions(Permissions::from_mode(mode)).map_err(Error::io("set the mode of", &this.0))?;
        file.write_all(bytes).map_err(Error::io("write", &this.0))?;
        file.sync_all().map_err(Error::io("sync", &this.0))?;
        Ok(this)
    }

    /// It has its name now, so there is nothing left to remove.
    fn published(mut self) {
        self.0 = PathBuf::new();
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty()
            && let Err(error) = fs::remove_file(&self.0)
        {
            tracing::warn!(path = %self.0.display(), %error, "a temporary file is left behind");
        }
    }
}

/// `.NAME.`, with NAME cut so that the whole name of a temporary fits.
fn temporary_prefix(path: &Path) -> OsString {
    // ".", ".", "PID-N" of two 64-bit numbers at most, ".tmp".
    const REST: usize = 2 + 41 + 4;
    let name = path.file_name().unwrap_or(OsStr::new("file")).as_bytes();
    let mut prefix = vec![b'.'];
    prefix.extend_from_slice(&name[..name.len().min(NAME_MAX - REST)]);
    prefix.push(b'.');
    OsString::from_vec(prefix)
}

fn temporary_name(path: &Path) -> OsString {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut name = temporary_prefix(path);
    name.push(format!("{}-{}.tmp", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    name
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn names(dir: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn write_replaces_the_whole_file_with_the_mode_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        write_durably(&path, b"a long first text", 0o644).unwrap();
        let first = fs::metadata(&path).unwrap();
        write_durably(&path, b"short", 0o600).unwrap();
        let second = fs::metadata(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"short");
        assert_eq!(second.mode() & 0o7777, 0o600);
        assert_ne!(first.ino(), second.ino(), "replaced, not rewritten in place");
        assert_eq!(names(dir.path()), ["state"], "no temporary is left");
    }

    #[test]
    fn write_replaces_a_symlink_and_leaves_its_target_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (link, target) = (dir.path().join("link"), dir.path().join("target"));
        fs::write(&target, b"precious").unwrap();
        symlink(&target, &link).unwrap();
        write_durably(&link, b"new", 0o600).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"precious");
        assert!(fs::symlink_metadata(&link).unwrap().is_file());
    }

    #[test]
    fn a_failed_write_names_path_and_step_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("taken");
        fs::create_dir(&path).unwrap();
        let text = write_durably(&path, b"x", 0o600).unwrap_err().to_string();
        assert!(text.starts_with(&format!("cannot replace {}", path.display())), "{text}");
        assert_eq!(names(dir.path()), ["taken"]);

        let text = write_durably(&dir.path().join("no/where"), b"x", 0o600).unwrap_err().to_string();
        assert!(text.contains("cannot create") && text.contains("/no/.where."), "{text}");
    }

    #[test]
    fn create_never_replaces_anything() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        create_durably(&file, b"first", 0o640).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o640);
        symlink("nowhere", &link).unwrap();
        for taken in [&file, &link] {
            let error = create_durably(taken, b"second", 0o600).unwrap_err();
            assert_eq!(error.kind(), Some(io::ErrorKind::AlreadyExists), "{error}");
        }
        assert_eq!(fs::read(&file).unwrap(), b"first");
        assert_eq!(names(dir.path()), ["file", "link"]);
    }

    #[test]
    fn remove_says_what_it_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, b"").unwrap();
        assert_eq!(remove_durably(&path).unwrap(), Removal::Removed);
        assert_eq!(remove_durably(&path).unwrap(), Removal::AlreadyGone);
        assert!(remove_durably(dir.path()).is_err(), "a directory is not a file");
    }

    #[test]
    fn rename_crosses_directories() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("sub/b"));
        fs::write(&from, b"x").unwrap();
        rename_durably(&from, &to).unwrap();
        assert!(!from.exists() && to.exists());
    }

    #[test]
    fn only_temporaries_of_the_same_file_are_cleared_away() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["state", ".state.12-0.tmp", ".state.12-1.tmp", ".state.mine.tmp", ".state2.12-0.tmp"] {
            fs::write(dir.path().join(name), b"").unwrap();
        }
        assert_eq!(remove_temporaries(&dir.path().join("state")).unwrap(), 2);
        assert_eq!(names(dir.path()), [".state.mine.tmp", ".state2.12-0.tmp", "state"]);
    }

    #[test]
    fn the_longest_name_still_gets_a_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n".repeat(NAME_MAX));
        write_durably(&path, b"x", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"x");
    }

    #[test]
    fn reading_stops_at_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, b"12345").unwrap();
        assert_eq!(read_bounded(&path, 5).unwrap(), b"12345");
        assert!(matches!(read_bounded(&path, 4), Err(Error::TooLong { limit: 4, .. })));
        // An endless file costs no more than the limit.
        assert!(matches!(read_bounded(Path::new("/dev/zero"), 4096), Err(Error::TooLong { .. })));
    }

    #[test]
    fn private_directories_are_private_at_every_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        assert_eq!(make_private_dir(&path).unwrap(), Made::Made);
        assert_eq!(make_private_dir(&path).unwrap(), Made::AlreadyThere);
        for made in [path.as_path(), path.parent().unwrap()] {
            assert_eq!(fs::metadata(made).unwrap().mode() & 0o777, 0o700);
        }
    }

    #[test]
    fn a_bare_name_lies_in_the_current_directory() {
        assert_eq!(parent(Path::new("x")), Path::new("."));
        assert_eq!(parent(Path::new("/x")), Path::new("/"));
        assert_eq!(parent(Path::new("a/b")), Path::new("a"));
        sync_dir(parent(Path::new("x"))).unwrap();
        assert!(sync_dir(Path::new("/dev/null")).is_err());
    }
}
