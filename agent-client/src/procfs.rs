//! What `/proc` says about processes.
//!
//! Every reader answers `None` (or nothing) for a process that ended while it was looked at, and for
//! what the caller may not see. A pid alone names nobody, since the kernel hands it out again: a process
//! is named by its pid *and* its [`start_time`].
//!
//! Source: proc(5).

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Longest command line that is read, in bytes; the kernel's own limit is a quarter of the stack's.
pub const MAX_COMMAND_LINE: u64 = 2 << 20;

/// Longest `/proc/PID/stat` that is read; the file has 52 numbers and a name of at most 64 bytes.
const MAX_STAT: u64 = 8 << 10;

/// Where the state stands in `/proc/PID/stat` once the name is cut off (field 3).
const STATE: usize = 0;

/// Where the start time stands there (field 22).
const START_TIME: usize = 19;

/// What the kernel puts behind the path of a program whose file is gone.
const DELETED: &[u8] = b" (deleted)";

/// Returns the pids of all visible processes, ascending.
pub fn pids() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> =
        entries.filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok())).collect();
    pids.sort_unstable();
    pids
}

/// Returns when the process started, in clock ticks since the host booted.
///
/// Source: proc(5) `/proc/pid/stat` field 22.
pub fn start_time(pid: u32) -> Option<u64> {
    fields(&read(pid, "stat", MAX_STAT)?)?.get(START_TIME)?.parse().ok()
}

/// Whether the process that started at `start` still runs; one that waits to be reaped does not.
pub fn is_alive(pid: u32, start: u64) -> bool {
    let Some(stat) = read(pid, "stat", MAX_STAT) else { return false };
    let Some(fields) = fields(&stat) else { return false };
    let running = fields.get(STATE).is_some_and(|state| !matches!(*state, "Z" | "X" | "x"));
    running && fields.get(START_TIME).and_then(|text| text.parse().ok()) == Some(start)
}

/// Returns the process's arguments, the program's name first, in the bytes that it was given.
///
/// Empty for a kernel thread and for a process that waits to be reaped. What lies beyond
/// [`MAX_COMMAND_LINE`] is left out, with the argument that it cuts.
pub fn command_line(pid: u32) -> Option<Vec<Vec<u8>>> {
    let mut bytes = read(pid, "cmdline", MAX_COMMAND_LINE)?;
    if bytes.len() as u64 == MAX_COMMAND_LINE {
        let whole = bytes.iter().rposition(|byte| *byte == 0).map_or(0, |at| at + 1);
        bytes.truncate(whole);
    }
    Some(split_arguments(&bytes))
}

/// Returns the name the kernel has for the process: at most 15 bytes, and the process may change it.
pub fn comm(pid: u32) -> Option<String> {
    let bytes = read(pid, "comm", 4096)?;
    Some(String::from_utf8_lossy(bytes.strip_suffix(b"\n").unwrap_or(&bytes)).into_owned())
}

/// Returns the file of the program that the process runs, as it was named when it started.
pub fn exe(pid: u32) -> Option<PathBuf> {
    let link = fs::read_link(entry(pid, "exe")).ok()?;
    let path = link.as_os_str().as_bytes();
    Some(PathBuf::from(OsStr::from_bytes(path.strip_suffix(DELETED).unwrap_or(path))))
}

/// Returns the process's working directory.
pub fn cwd(pid: u32) -> Option<PathBuf> {
    fs::read_link(entry(pid, "cwd")).ok()
}

/// Returns the inode numbers of the sockets that the process has open, once for each descriptor.
pub fn socket_inodes(pid: u32) -> Option<Vec<u64>> {
    let entries = fs::read_dir(entry(pid, "fd")).ok()?.flatten();
    Some(entries.filter_map(|entry| socket_inode(&fs::read_link(entry.path()).ok()?)).collect())
}

/// Returns the identity of this boot: two times of two boots cannot be compared.
///
/// Source: random(4) `/proc/sys/kernel/random/boot_id`.
pub fn boot_id() -> Option<String> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(text.trim_end().to_owned())
}

fn entry(pid: u32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

fn read(pid: u32, name: &str, limit: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(entry(pid, name)).ok()?.take(limit).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Splits `stat` behind the name. The name stands in parentheses and may itself hold parentheses and
/// spaces, so the last `)` ends it.
fn fields(stat: &[u8]) -> Option<Vec<&str>> {
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    Some(std::str::from_utf8(&stat[end + 1..]).ok()?.split_ascii_whitespace().collect())
}

fn split_arguments(bytes: &[u8]) -> Vec<Vec<u8>> {
    if bytes.is_empty() {
        return Vec::new();
    }
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    bytes.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect()
}

fn socket_inode(link: &Path) -> Option<u64> {
    let text = link.as_os_str().as_bytes().strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Makes a path of bytes that came from the kernel.
pub(crate) fn path_from(bytes: &[u8]) -> PathBuf {
    PathBuf::from(std::ffi::OsString::from_vec(bytes.to_vec()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// Starts a `cat` that lives until its stdin is closed, and waits for it to run: a child has no
    /// arguments yet when `spawn` returns.
    fn start(program: &mut Command) -> Child {
        let mut child = program.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        child
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = b"7 (a) b (c)) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 99 1 2";
        let fields = fields(stat).unwrap();
        assert_eq!((fields[STATE], fields[START_TIME]), ("S", "4711"));
        assert_eq!(super::fields(b"no name"), None);
        assert_eq!(super::fields(b"7 (a) S \xff"), None);
    }

    #[test]
    fn arguments_may_be_empty() {
        assert_eq!(split_arguments(b""), Vec::<Vec<u8>>::new());
        assert_eq!(split_arguments(b"a\0\0b c\0"), [b"a".to_vec(), vec![], b"b c".to_vec()]);
        assert_eq!(split_arguments(b"title without an end"), [b"title without an end".to_vec()]);
    }

    #[test]
    fn a_process_is_known_by_pid_and_start() {
        let mut child = start(&mut Command::new("cat"));
        let pid = child.id();
        let start = start_time(pid).unwrap();
        assert!(is_alive(pid, start));
        assert!(!is_alive(pid, start + 1), "P4: the same pid with another start is another process");
        assert!(pids().contains(&pid));

        drop(child.stdin.take());
        rustix::process::waitid(
            rustix::process::WaitId::Pid(rustix::process::Pid::from_child(&child)),
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
        )
        .unwrap();
        assert_eq!(start_time(pid), Some(start), "it still waits to be reaped");
        assert!(!is_alive(pid, start));
        assert_eq!(command_line(pid), Some(vec![]));
        child.wait().unwrap();
        assert_eq!((start_time(pid), comm(pid), exe(pid), cwd(pid)), (None, None, None, None));
        assert_eq!((command_line(pid), socket_inodes(pid)), (None, None));
    }

    #[test]
    fn a_child_is_seen_with_its_words_and_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("a) S (b");
        fs::copy("/bin/cat", &program).unwrap();
        let mut child = start(Command::new(&program).arg("-").current_dir(dir.path()));
        let pid = child.id();
        let arguments = command_line(pid).unwrap();
        assert_eq!(arguments, [program.as_os_str().as_bytes().to_vec(), b"-".to_vec()]);
        assert_eq!(comm(pid).unwrap(), "a) S (b");
        assert_eq!(cwd(pid).unwrap(), dir.path().canonicalize().unwrap());
        fs::remove_file(&program).unwrap();
        assert_eq!(exe(pid).unwrap(), dir.path().canonicalize().unwrap().join("a) S (b"));
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    #[test]
    fn sockets_are_found_by_inode() {
        let (one, _other) = UnixStream::pair().unwrap();
        let inode = rustix::fs::fstat(&one).unwrap().st_ino;
        assert!(socket_inodes(std::process::id()).unwrap().contains(&inode));
        assert_eq!(socket_inode(Path::new("pipe:[7]")), None);
        assert_eq!(socket_inode(Path::new("socket:[7]")), Some(7));
    }

    #[test]
    fn a_boot_has_a_name() {
        assert_eq!(boot_id().unwrap().len(), 36);
    }
}
