//! Who has a file open.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::Error;

/// A process that has the file at `path` open, if there is one; none if the file is not there.
///
/// Only processes that this user may look into are seen: root sees all of this pid namespace, others
/// their own.
///
/// # Errors
/// [`Error::Io`] if the file or the process list cannot be looked at.
///
/// Source: proc(5), `/proc/PID/fd`.
pub fn user_of(path: &Path) -> Result<Option<u32>, Error> {
    let wanted = match fs::metadata(path) {
        Ok(metadata) => (metadata.dev(), metadata.ino()),
        Err(fault) if fault.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(fault) => return Err(Error::io("look at", path)(fault)),
    };
    let proc = Path::new("/proc");
    let processes = fs::read_dir(proc).map_err(Error::io("list", proc))?;
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    Ok(pids.into_iter().find(|pid| has_open(*pid, wanted)))
}

/// A process that ends meanwhile, or belongs to somebody else, counts as having nothing open.
fn has_open(pid: u32, wanted: (u64, u64)) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    descriptors
        .filter_map(|entry| fs::metadata(entry.ok()?.path()).ok())
        .any(|open| (open.dev(), open.ino()) == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_process_that_has_a_file_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        assert_eq!(user_of(&path).unwrap(), None);
        let file = fs::File::create(&path).unwrap();
        assert_eq!(user_of(&path).unwrap(), Some(std::process::id()));
        drop(file);
        assert_eq!(user_of(&path).unwrap(), None);
    }
}
