//! Who has a file open.

use std::fmt;
use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crate::Error;

/// Who uses a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Users {
    /// No process that could use an image has it open.
    Nobody,
    /// This process has it open.
    Process(u32),
    /// Nobody is seen to have it open, but these processes are QEMU's and cannot be looked into.
    Unknown(Vec<u32>),
}

impl Users {
    /// Who uses `what`, for people; none if nobody does.
    pub fn describe(&self, what: impl fmt::Display) -> Option<String> {
        match self {
            Self::Nobody => None,
            Self::Process(pid) => Some(format!("process {pid} has {what} open")),
            Self::Unknown(pids) => {
                let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
                Some(format!("process {} may have {what} open, and may not be looked into", pids.join(", ")))
            }
        }
    }
}

/// Whether a process has the file at `path` open; nobody has if the file is not there.
///
/// Only processes of this pid namespace are seen. Root may look into all of them, others into their own:
/// one that may not be looked into counts as [`Users::Unknown`] if its name is a QEMU's.
///
/// # Errors
/// [`Error::Io`] if the file or the process list cannot be looked at.
///
/// Source: proc(5), `/proc/PID/fd` and `/proc/PID/comm`.
pub fn user_of(path: &Path) -> Result<Users, Error> {
    let wanted = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(fault) if fault.kind() == std::io::ErrorKind::NotFound => return Ok(Users::Nobody),
        Err(fault) => return Err(Error::io("look at", path)(fault)),
    };
    if wanted.file_type().is_block_device() {
        // A device has many nodes; its number is one.
        return search(|open| open.file_type().is_block_device() && open.rdev() == wanted.rdev());
    }
    search(|open| (open.dev(), open.ino()) == (wanted.dev(), wanted.ino()))
}

/// Whether a process has a file on the file system that is mounted at `path` open.
///
/// # Errors
/// As [`user_of`].
pub fn user_below(path: &Path) -> Result<Users, Error> {
    let device = fs::metadata(path).map_err(Error::io("look at", path))?.dev();
    search(|open| open.dev() == device)
}

fn search(is_wanted: impl Fn(&Metadata) -> bool) -> Result<Users, Error> {
    let proc = Path::new("/proc");
    let processes = fs::read_dir(proc).map_err(Error::io("list", proc))?;
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let mut closed_to_us = Vec::new();
    for pid in pids {
        match has_open(pid, &is_wanted) {
            Some(true) => return Ok(Users::Process(pid)),
            Some(false) => {}
            None => closed_to_us.push(pid),
        }
    }
    closed_to_us.retain(|pid| is_qemu(*pid));
    Ok(if closed_to_us.is_empty() { Users::Nobody } else { Users::Unknown(closed_to_us) })
}

/// None if this process may not be looked into. One that ends meanwhile has nothing open.
fn has_open(pid: u32, is_wanted: impl Fn(&Metadata) -> bool) -> Option<bool> {
    let descriptors = match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(descriptors) => descriptors,
        Err(fault) => return (fault.kind() != std::io::ErrorKind::PermissionDenied).then_some(false),
    };
    let mut open = descriptors.filter_map(|entry| fs::metadata(entry.ok()?.path()).ok());
    Some(open.any(|open| is_wanted(&open)))
}

/// By the name that everybody may read.
fn is_qemu(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| is_qemu_name(name.trim_end()))
}

fn is_qemu_name(name: &str) -> bool {
    name.contains("qemu") || name.contains("kvm")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_process_that_has_a_file_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        assert_eq!(user_of(&path).unwrap(), Users::Nobody, "there is no file");
        let file = fs::File::create(&path).unwrap();
        assert_eq!(user_of(&path).unwrap(), Users::Process(std::process::id()));
        drop(file);
        // Without root's rights, a QEMU of somebody else may be running here.
        assert!(matches!(user_of(&path).unwrap(), Users::Nobody | Users::Unknown(_)));
    }

    #[test]
    fn knows_a_qemu_by_its_name() {
        assert!(["qemu-system-x86", "qemu-img", "kvm"].into_iter().all(is_qemu_name));
        assert!(!["bash", "snapctl", "systemd"].into_iter().any(is_qemu_name));
    }
}
