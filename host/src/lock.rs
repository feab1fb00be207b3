//! Locks between processes that cannot go stale.
//!
//! A [`FileLock`] is a kernel lock on an open file: however its process ends, it is free at once. The
//! file's text (who holds it) is only for messages and is never believed: a holder that is no longer
//! there, or whose pid belongs to another process now, is not named.
//!
//! The file stays when the lock is released. Removing it would let two processes hold "the" lock: one on
//! the removed file, one on its successor.
//!
//! Source: flock(2); `std::fs::File::try_lock`.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use crate::{Error, files};

/// How often a waiting process looks again. flock(2) can wait by itself, but not with a limit.
const POLL: Duration = Duration::from_millis(50);

/// Longest command line that is kept, in characters.
const COMMAND_MAX: usize = 200;

/// Longest text of a lock file that is read, in bytes.
const TEXT_MAX: u64 = 4096;

/// The lock was not had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else holds it, and still held it after the time that was to be waited.
    #[error("{} is held by {}{}", path.display(), holder_text(holder.as_ref()), waited_text(*waited))]
    Busy {
        /// The lock file.
        path: PathBuf,
        /// The process that holds it, where its word could be verified.
        holder: Option<Holder>,
        /// How long was waited.
        waited: Duration,
    },
    /// The lock file could not be opened, locked or written.
    #[error(transparent)]
    Host(#[from] Error),
}

/// The process that holds a lock: it is alive, and is the one that took it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// When it started, in clock ticks since the host did; with the pid it names one process for good.
    pub started: u64,
    /// Its command line, cut to 200 characters, control characters replaced by `?`.
    pub command: String,
}

/// A lock that is held until this is dropped or the process ends.
///
/// A child that the process starts does not inherit it (the file is close-on-exec).
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub struct FileLock {
    file: File,
    path: PathBuf,
}

impl FileLock {
    /// Takes the lock at `path`, waiting at most `wait` for whoever holds it; `None` does not wait.
    ///
    /// Makes the file (0600) and its directories (0700) where they are missing. Waiting processes have
    /// no order among them. Dropping the future gives up waiting and leaves nothing behind.
    ///
    /// # Errors
    /// [`LockError::Busy`] when the time is over; [`LockError::Host`] if the file cannot be used.
    pub async fn acquire(path: &Path, wait: Option<Duration>) -> Result<Self, LockError> {
        let begun = Instant::now();
        loop {
            if let Some(lock) = attempt(path)? {
                return Ok(lock);
            }
            let waited = begun.elapsed();
            match wait.and_then(|wait| wait.checked_sub(waited)) {
                Some(left) if !left.is_zero() => tokio::time::sleep(left.min(POLL)).await,
                _ => return Err(busy(path, waited)),
            }
        }
    }

    /// Takes the lock at `path` if it is free now.
    ///
    /// # Errors
    /// As [`FileLock::acquire`].
    pub fn try_acquire(path: &Path) -> Result<Self, LockError> {
        attempt(path)?.ok_or_else(|| busy(path, Duration::ZERO))
    }

    /// The lock file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes who holds it, for the messages of others.
    fn sign(&mut self) -> Result<(), Error> {
        let text = Holder::current().to_text();
        let path = self.path.clone();
        self.file.set_len(0).map_err(Error::io("empty", &path))?;
        self.file.rewind().map_err(Error::io("rewind", &path))?;
        self.file.write_all(text.as_bytes()).map_err(Error::io("write", &path))
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // The kernel releases the lock when the file is closed; a name left in the file is harmless.
        if let Err(error) = self.file.set_len(0) {
            tracing::debug!(path = %self.path.display(), %error, "the holder's name stays in the lock file");
        }
    }
}

/// Returns the living process that holds the lock at `path`, or none if it is free or cannot be told.
///
/// # Errors
/// [`Error::Io`] if the file is there but cannot be read.
pub fn holder(path: &Path) -> Result<Option<Holder>, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("open", path)(e)),
    };
    match file.try_lock_shared() {
        // Free: closing the file gives the shared lock back.
        Ok(()) => Ok(None),
        Err(TryLockError::Error(e)) => Err(Error::io("lock", path)(e)),
        Err(TryLockError::WouldBlock) => read_holder(&file, path),
    }
}

impl Holder {
    fn current() -> Self {
        let pid = std::process::id();
        Self { pid, started: start_time(pid).unwrap_or(0), command: command_line() }
    }

    fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    fn to_text(&self) -> String {
        format!("pid {}\nstarted {}\ncommand {}\n", self.pid, self.started, self.command)
    }

    fn from_text(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
        Some(Self {
            pid: field("pid")?.parse().ok()?,
            started: field("started")?.parse().ok()?,
            command: printable(field("command")?.as_bytes()),
        })
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.command)
    }
}

fn holder_text(holder: Option<&Holder>) -> String {
    holder.map_or_else(|| "another process".to_owned(), Holder::to_string)
}

fn waited_text(waited: Duration) -> String {
    // Without waiting, the time is that of one system call.
    if waited < POLL { String::new() } else { format!(" after {:.1} s of waiting", waited.as_secs_f64()) }
}

/// One try; `None` if somebody else holds it.
fn attempt(path: &Path) -> Result<Option<FileLock>, Error> {
    files::make_private_dir(files::parent(path))?;
    loop {
        let file = open(path)?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(e)) => return Err(Error::io("lock", path)(e)),
            Ok(()) if is_at(&file, path)? => {
                let mut lock = FileLock { file, path: path.to_owned() };
                lock.sign()?;
                return Ok(Some(lock));
            }
            // Somebody (a cleaner of /run) removed the file between open and lock: lock its successor.
            Ok(()) => {}
        }
    }
}

fn open(path: &Path) -> Result<File, Error> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)
        .map_err(Error::io("open the lock file", path))
}

/// Whether `file` is still the one that `path` names.
fn is_at(file: &File, path: &Path) -> Result<bool, Error> {
    let locked = file.metadata().map_err(Error::io("look at", path))?;
    match fs::symlink_metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (locked.dev(), locked.ino())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::io("look at", path)(e)),
    }
}

fn busy(path: &Path, waited: Duration) -> LockError {
    // The name is a courtesy: where it cannot be read, the lock is busy all the same.
    let holder = File::open(path).ok().and_then(|file| read_holder(&file, path).ok().flatten());
    LockError::Busy { path: path.to_owned(), holder, waited }
}

fn read_holder(file: &File, path: &Path) -> Result<Option<Holder>, Error> {
    let mut text = Vec::new();
    file.take(TEXT_MAX).read_to_end(&mut text).map_err(Error::io("read", path))?;
    let holder = std::str::from_utf8(&text).ok().and_then(Holder::from_text);
    Ok(holder.filter(Holder::is_alive))
}

/// When a process started, in clock ticks since the host did; none if there is no such process. With the pid it names
/// one process for good.
///
/// Source: proc(5), `starttime`. Field 2 is in parentheses and may hold any character, so that fields
/// are counted from the last `)`.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = files::read_bounded(Path::new(&format!("/proc/{pid}/stat")), TEXT_MAX).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

fn command_line() -> String {
    let words: Vec<_> = std::env::args_os().map(|word| printable(word.as_encoded_bytes())).collect();
    words.join(" ").chars().take(COMMAND_MAX).collect()
}

/// Text without control characters, so that a message can hold it.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};

    use super::*;

    const CHILD: &str = "HOST_LOCK_TEST_CHILD";

    /// Runs this test binary again, in the role that `test` plays when [`CHILD`] is set.
    fn child(test: &str, path: &Path) -> Child {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("lock::tests::{test}"), "--nocapture"])
            .env(CHILD, path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("holding")), "the child holds the lock");
        child
    }

    /// The child's role: takes the lock, says so, and holds it until its stdin ends.
    fn hold_if_child() -> bool {
        let Some(path) = std::env::var_os(CHILD) else { return false };
        let _lock = FileLock::try_acquire(Path::new(&path)).unwrap();
        println!("holding");
        io::copy(&mut io::stdin(), &mut io::sink()).unwrap();
        true
    }

    #[tokio::test]
    async fn a_killed_holder_frees_the_lock_and_is_named_no_more() {
        if hold_if_child() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/vm1.lock");
        let mut other = child("a_killed_holder_frees_the_lock_and_is_named_no_more", &path);

        let error = FileLock::try_acquire(&path).unwrap_err();
        let LockError::Busy { holder: Some(found), .. } = &error else { panic!("{error}") };
        assert_eq!(found.pid, other.id());
        assert!(found.command.contains("a_killed_holder"), "{found}");
        assert!(error.to_string().contains(&format!("held by process {}", other.id())), "{error}");
        assert_eq!(holder(&path).unwrap().as_ref(), Some(found));

        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(holder(&path).unwrap(), None);
        let _mine = FileLock::try_acquire(&path).unwrap();
        assert_eq!(holder(&path).unwrap().unwrap().pid, std::process::id());
    }

    #[tokio::test]
    async fn a_waiting_process_gets_the_lock_when_it_is_released() {
        if hold_if_child() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm1.lock");
        let mut other = child("a_waiting_process_gets_the_lock_when_it_is_released", &path);
        let waiting = tokio::spawn({
            let path = path.clone();
            async move { FileLock::acquire(&path, Some(Duration::from_secs(60))).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(other.stdin.take());
        assert_eq!(waiting.await.unwrap().unwrap().path(), path);
        other.wait().unwrap();
    }

    #[tokio::test]
    async fn waiting_ends_with_its_limit_and_says_how_long_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let _held = FileLock::try_acquire(&path).unwrap();
        let error = FileLock::acquire(&path, Some(Duration::from_millis(120))).await.unwrap_err();
        assert!(matches!(error, LockError::Busy { waited, .. } if waited >= Duration::from_millis(120)));
        assert!(error.to_string().ends_with("after 0.1 s of waiting"), "{error}");
        let error = FileLock::acquire(&path, None).await.unwrap_err();
        assert!(error.to_string().ends_with(')'), "nothing about waiting: {error}");
    }

    #[test]
    fn of_many_at_once_exactly_one_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let start = std::sync::Barrier::new(20);
        let results: Vec<_> = std::thread::scope(|scope| {
            let race = || {
                start.wait();
                FileLock::try_acquire(&path)
            };
            let racers: Vec<_> = (0..20).map(|_| scope.spawn(race)).collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
        drop(results);
        drop(FileLock::try_acquire(&path).unwrap());
        assert!(path.exists(), "the file stays");
    }

    #[test]
    fn a_lock_on_a_removed_file_is_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let removed = open(&path).unwrap();
        assert!(is_at(&removed, &path).unwrap());
        fs::remove_file(&path).unwrap();
        assert!(!is_at(&removed, &path).unwrap());
        let _lock = FileLock::try_acquire(&path).unwrap();
        assert!(!is_at(&removed, &path).unwrap(), "the successor is another file");
    }

    #[test]
    fn neither_a_reused_pid_nor_nonsense_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let reused = format!("pid {}\nstarted 1\ncommand snapctl create\n", std::process::id());
        for text in [&reused, "", "pid", "pid 99999999999\n", "\u{1b}[2J", &"x".repeat(10_000)] {
            fs::write(&path, text).unwrap();
            let file = File::open(&path).unwrap();
            file.lock().unwrap();
            let error = FileLock::try_acquire(&path).unwrap_err().to_string();
            assert!(error.ends_with("is held by another process"), "{error}");
        }
    }

    #[test]
    fn a_holder_is_read_as_it_was_written() {
        let me = Holder::current();
        assert!(me.is_alive() && me.started > 0);
        assert_eq!(Holder::from_text(&me.to_text()), Some(me));
        let odd = Holder { pid: 7, started: 8, command: printable(b"a\nb\x1b[m \xff") };
        assert_eq!(odd.command, "a?b?[m \u{fffd}");
        assert_eq!(Holder::from_text(&odd.to_text()), Some(odd));
    }

    #[test]
    fn a_symlink_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (link, target) = (dir.path().join("lock"), dir.path().join("precious"));
        fs::write(&target, "keep").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let error = FileLock::try_acquire(&link).unwrap_err();
        assert!(error.to_string().starts_with("cannot open the lock file"), "{error}");
        assert_eq!(fs::read_to_string(&target).unwrap(), "keep");
    }
}
