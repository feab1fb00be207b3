//! The mark by which a directory is known again: a small file in it that holds an identity.
//!
//! An empty mount point has none, and another file system has another one or none. So a pool never writes
//! into a directory that only looks like its own, whatever kind of file system should have been there; asking the
//! kernel for a file system's UUID would work for some of them only.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use host::Error as HostError;
use host::files;
use model::Name;

use super::files::{FilePlace, Files};
use super::{Changed, PoolError, wrong_place};

/// A directory that is a pool by its mark alone, and has nothing to start.
#[derive(Debug)]
pub(super) struct Marked {
    pub kind: &'static str,
    pub id: String,
}

impl FilePlace for Marked {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn ready(&self, files: &Files) -> Result<(), PoolError> {
        expect(&files.pool, &files.root, &self.id)
    }

    fn start(&self, files: &Files) -> Result<Changed, PoolError> {
        self.ready(files).map(|()| Changed::AlreadySo)
    }

    fn stop(&self, _files: &Files) -> Result<Changed, PoolError> {
        Ok(Changed::Nothing)
    }

    fn forget(&self, files: &Files) -> Result<(), PoolError> {
        remove(&files.root, &self.id)
    }
}

/// Its name in the directory.
const FILE: &str = ".snapctl-pool";
const LENGTH_MAX: u64 = 4096;

/// A new identity.
pub(super) fn new_id() -> Result<String, PoolError> {
    let mut bytes = [0; 16];
    let random = Path::new("/dev/urandom");
    let opened = File::open(random).and_then(|mut file| file.read_exact(&mut bytes));
    opened.map_err(HostError::io("read", random))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The identity of `dir`, if it is marked.
pub(super) fn read(dir: &Path) -> Result<Option<String>, PoolError> {
    let bytes = match files::read_bounded(&file(dir), LENGTH_MAX) {
        Ok(bytes) => bytes,
        Err(fault) if fault.kind() == Some(io::ErrorKind::NotFound) => return Ok(None),
        Err(fault) => return Err(fault.into()),
    };
    let text = String::from_utf8_lossy(&bytes);
    let id = text.lines().find_map(|line| line.strip_prefix("id "));
    Ok(Some(id.unwrap_or_default().trim().chars().filter(|c| !c.is_control()).collect()))
}

/// Marks `dir`, which has no mark.
pub(super) fn write(dir: &Path, id: &str) -> Result<(), PoolError> {
    let text = format!(
        "This directory is a pool of snapctl's; without this file it is not taken for one.\nid {id}\n"
    );
    Ok(files::create_durably(&file(dir), text.as_bytes(), 0o644)?)
}

/// Takes the mark `id` away from `dir`; another one stays.
pub(super) fn remove(dir: &Path, id: &str) -> Result<(), PoolError> {
    if read(dir)?.as_deref() == Some(id) {
        files::remove_durably(&file(dir))?;
    }
    Ok(())
}

/// Marks `dir` unless it is marked; gives its identity.
pub(super) fn adopt(dir: &Path) -> Result<String, PoolError> {
    if let Some(id) = read(dir)? {
        return Ok(id);
    }
    let id = new_id()?;
    write(dir, &id)?;
    Ok(id)
}

/// Whether `dir` is the directory that was marked with `id`.
///
/// # Errors
/// [`PoolError::WrongPlace`] if not.
pub(super) fn expect(pool: &Name, dir: &Path, id: &str) -> Result<(), PoolError> {
    let wrong = |why: &str| Err(wrong_place(pool, format!("{} {why}", dir.display())));
    if !dir.is_dir() {
        return wrong("is no directory, or is not there");
    }
    match read(dir)? {
        Some(found) if found == id => Ok(()),
        Some(found) => {
            wrong(&format!("is marked as another pool's ({found}): this pool was defined on {id}"))
        }
        None => wrong(
            "has no mark of this pool's: the file system that it was defined on is not mounted there, or was replaced",
        ),
    }
}

fn file(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_known_again_and_another_is_not() {
        let name: Name = "p1".parse().unwrap();
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = adopt(one.path()).unwrap();
        assert_eq!((id.len(), adopt(one.path()).unwrap()), (32, id.clone()));
        expect(&name, one.path(), &id).unwrap();
        let fault = expect(&name, other.path(), &id).unwrap_err();
        assert!(fault.to_string().contains("no mark"), "{fault}");
        let _ = adopt(other.path()).unwrap();
        assert!(expect(&name, other.path(), &id).unwrap_err().to_string().contains("another pool"));
        remove(other.path(), &id).unwrap();
        assert!(read(other.path()).unwrap().is_some(), "not ours to remove");
        remove(one.path(), &id).unwrap();
        assert_eq!(read(one.path()).unwrap(), None);
        assert!(expect(&name, Path::new("/does/not/exist"), &id).is_err());
    }
}
