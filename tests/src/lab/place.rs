//! Where guests live and how many may run: one directory for each, and a semaphore of file locks.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, IFlags, flock, ioctl_getflags, ioctl_setflags};

use super::run::{output, program};

/// `sun_path` of unix(7), with its terminating zero.
const SOCKET_PATH_LIMIT: usize = 108;
/// The longest name of a file in a guest's directory that a socket has: ours and the tests'.
const LONGEST_SOCKET_NAME: usize = "/longest-socket".len();
/// How many guests run at once where `SNAPCTL_LAB_GUESTS` does not say: two cores carry two.
const GUESTS: usize = 2;
/// A guest ends whenever its test does; nobody can wait for one of several locks.
const SLOT_POLL: Duration = Duration::from_millis(50);

/// A directory of its own, removed on drop unless `SNAPCTL_LAB_KEEP` is set.
///
/// Its `owner` file is locked as long as the owner lives: directories without one are swept.
#[derive(Debug)]
pub struct Place {
    dir: PathBuf,
    _owner: File,
}

impl Place {
    /// Makes a directory in `run`, after sweeping what dead owners left there.
    pub(super) fn new(run: &Path) -> Result<Self> {
        fs::create_dir_all(run)?;
        sweep(run);
        let dir = free_dir(run)?;
        let owner = File::create(dir.join("owner"))?;
        flock(&owner, FlockOperation::NonBlockingLockExclusive)?;
        let place = Self { dir, _owner: owner };
        let length = place.dir.as_os_str().len() + LONGEST_SOCKET_NAME;
        if length >= SOCKET_PATH_LIMIT {
            bail!(
                "{} is too long a path for a unix socket; name a shorter one with SNAPCTL_LAB_CACHE",
                place.dir.display()
            );
        }
        Ok(place)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// Makes an XFS of so many MiB in a file beside `dir`, and mounts it there. Its place unmounts it.
pub(super) fn mount_xfs(dir: &Path, mib: u64) -> Result<()> {
    let image = dir.with_extension("xfs");
    File::create(&image)?.set_len(mib << 20)?;
    output(Command::new(program("mkfs.xfs")?).arg("-q").arg(&image))?;
    output(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(dir))?;
    Ok(())
}

/// Whether XFS can be mounted here: by root, on a kernel that has it and loop devices.
pub fn can_mount_xfs() -> bool {
    let known = || fs::read_to_string("/proc/filesystems").is_ok_and(|text| text.contains("\txfs\n"));
    let load = || Command::new("modprobe").arg("xfs").output().is_ok_and(|output| output.status.success());
    rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists() && (known() || load())
}

/// Unmounts what [`mount_xfs`] has mounted in a place.
fn unmount(place: &Path) {
    use std::os::unix::fs::MetadataExt;

    let disks = place.join("disks");
    let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
    if disks.is_dir() && device(&disks) != device(place) {
        // Lazily, since a QEMU that has just been killed may still hold a file.
        let _ = Command::new("umount").arg("-l").arg(&disks).status();
    }
}

impl Drop for Place {
    #[allow(clippy::print_stderr, reason = "the person who asked to keep the wreck must learn where it is")]
    fn drop(&mut self) {
        if std::env::var_os("SNAPCTL_LAB_KEEP").is_some_and(|value| value != "0") {
            // A kept directory has no owner to miss, so sweeping leaves it alone.
            let _ = fs::remove_file(self.dir.join("owner"));
            eprintln!("lab: kept {}", self.dir.display());
            return;
        }
        unmount(&self.dir);
        if let Err(error) = remove_tree(&self.dir) {
            eprintln!("lab: cannot remove {}: {error}", self.dir.display());
        }
    }
}

/// The right to run a guest; shared by the guests of one test.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    _lock: Arc<File>,
}

impl Slot {
    /// Waits until fewer than the permitted number of guests run on this machine.
    #[allow(clippy::print_stderr, reason = "who waits for minutes should learn what for")]
    pub(super) async fn take(run: &Path) -> Result<Self> {
        let count = std::env::var("SNAPCTL_LAB_GUESTS").ok().and_then(|n| n.parse().ok()).unwrap_or(GUESTS);
        fs::create_dir_all(run)?;
        let open = |n| OpenOptions::new().create(true).append(true).open(run.join(format!("slot{n}.lock")));
        let mut files = (0..count.max(1)).map(open).collect::<Result<Vec<File>, _>>()?;
        let mut told = false;
        loop {
            let free = files.iter().position(|f| flock(f, FlockOperation::NonBlockingLockExclusive).is_ok());
            if let Some(n) = free {
                return Ok(Self { _lock: Arc::new(files.swap_remove(n)) });
            }
            if !std::mem::replace(&mut told, true) {
                eprintln!("lab: {count} guests run already; waiting for one of them to end");
            }
            tokio::time::sleep(SLOT_POLL).await;
        }
    }
}

/// Removes `dir` with all that is in it; takes the immutable flag off what snapctl has sealed.
///
/// # Errors
/// When something in it cannot be removed.
pub fn remove_tree(dir: &Path) -> std::io::Result<()> {
    unseal(dir);
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Returns the directories in `run` whose owner lives.
pub fn places(run: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(run).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path());
    entries.filter(|dir| is_owned(dir)).collect()
}

fn is_owned(dir: &Path) -> bool {
    let lock = |owner: File| flock(&owner, FlockOperation::NonBlockingLockExclusive);
    File::open(dir.join("owner")).is_ok_and(|owner| lock(owner).is_err())
}

fn unseal(path: &Path) {
    let Ok(meta) = fs::symlink_metadata(path) else { return };
    if !(meta.is_file() || meta.is_dir()) {
        return;
    }
    if let Ok(file) = File::open(path) {
        let sealed = IFlags::IMMUTABLE | IFlags::APPEND;
        match ioctl_getflags(&file) {
            // Fails without the right to; then removing says so.
            Ok(flags) if flags.intersects(sealed) => drop(ioctl_setflags(&file, flags - sealed)),
            _ => (),
        }
    }
    for entry in fs::read_dir(path).into_iter().flatten().filter_map(Result::ok) {
        unseal(&entry.path());
    }
}

fn free_dir(run: &Path) -> Result<PathBuf> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    for _ in 0..1000 {
        let name = format!("{:x}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        match fs::create_dir(run.join(&name)) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => (),
            result => return result.map(|()| run.join(&name)).with_context(|| run.display().to_string()),
        }
    }
    bail!("no free name in {}", run.display())
}

/// Removes the directories whose owner died without cleaning up (SIGKILL).
fn sweep(run: &Path) {
    for entry in fs::read_dir(run).into_iter().flatten().filter_map(Result::ok) {
        let Ok(owner) = File::open(entry.path().join("owner")) else { continue };
        if flock(&owner, FlockOperation::NonBlockingLockExclusive).is_ok() {
            unmount(&entry.path());
            // Another sweep may be at it; what is left falls to the next.
            drop(remove_tree(&entry.path()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_owners_directory_is_swept_and_a_live_ones_is_not() {
        let run = tempfile::tempdir().unwrap();
        let live = Place::new(run.path()).unwrap();
        let dead = run.path().join("dead");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("owner"), "").unwrap();
        let other = Place::new(run.path()).unwrap();
        assert!(live.dir().exists() && other.dir().exists());
        assert!(!dead.exists());
    }
}
