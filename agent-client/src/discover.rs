//! Finding the VMs of this host: running QEMU processes, and what their command lines say.
//!
//! What is found is a proposal for a person: names, monitor sockets, agent sockets and disks as they were
//! asked for at the start. What the VM has *now* is asked of its monitor. A configuration that was read
//! with `-readconfig`, or made through a monitor, is not seen.
//!
//! [`CommandLine`] reads the arguments, [`options::Options`] the syntax of one.
//!
//! Source: qemu(1); QEMU util/qemu-option.c `opts_do_parse`, softmmu/vl.c `drive_add`.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use self::command_line::CommandLine;
use crate::procfs;

mod command_line;
mod options;
use model::Name;
use serde::Serialize;

/// Longest name of a VM. Source: the grammar of [`Name`].
const MAX_NAME: usize = 64;

/// A running QEMU, as its command line describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FoundVm {
    /// A name that `vm add` would take: from `-name`, else `vm-PID`; unique among those found together.
    pub name: Name,
    /// What `-name` says, fit for a terminal.
    pub guest_name: Option<String>,
    /// The process.
    pub pid: u32,
    /// When it started, in clock ticks since boot: pid and start together name a process.
    pub start_time: u64,
    /// The program's file, where the caller may see it.
    pub executable: Option<PathBuf>,
    /// What `-uuid` says.
    pub uuid: Option<String>,
    /// The sockets on which QEMU serves QMP, in the order of the command line, absolute. One that was
    /// handed over as an open descriptor has no path and is left out.
    pub qmp: Vec<PathBuf>,
    /// The socket of the guest agent's port, absolute.
    pub agent: Option<PathBuf>,
    /// What the guest sees as drives, in the order of the command line.
    pub disks: Vec<FoundDisk>,
    /// The manager that started it and that has its own idea of its disks: `libvirt` or `proxmox`.
    pub managed_by: Option<&'static str>,
}

/// A drive of a found VM, as it was at the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FoundDisk {
    /// The id of the guest's device.
    pub qdev: Option<String>,
    /// The alias of a `-drive` or the node-name of a `-blockdev`.
    pub drive: Option<String>,
    /// Where its data was.
    pub source: DiskSource,
    /// The format that was named; `None` means that QEMU guesses it from what the guest wrote.
    pub format: Option<String>,
    /// Whether it was asked for as read-only.
    pub read_only: bool,
    /// Whether it is a CD-ROM drive.
    pub cdrom: bool,
}

/// Where a drive's data is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskSource {
    /// A file or a block device, absolute.
    File(PathBuf),
    /// Something else, by QEMU's name for the protocol (`rbd`, `nbd`, …); `unknown` where it cannot be told.
    Protocol(String),
    /// Nothing: a drive without a medium.
    Empty,
}

/// Returns the QEMU processes of this host that the caller can see, by pid.
///
/// One that ends meanwhile is left out, and so is one whose command line cannot be read.
pub fn discover() -> Vec<FoundVm> {
    let mut taken = HashSet::new();
    procfs::pids().into_iter().filter_map(|pid| look_at(pid, &mut taken)).collect()
}

fn look_at(pid: u32, taken: &mut HashSet<String>) -> Option<FoundVm> {
    let start_time = procfs::start_time(pid)?;
    let arguments = procfs::command_line(pid)?;
    let executable = procfs::exe(pid);
    if !runs_qemu(arguments.first()?, executable.as_deref(), procfs::comm(pid)) {
        return None;
    }
    let mut found = CommandLine::parse(&arguments[1..]);
    found.make_absolute(procfs::cwd(pid).as_deref());
    // The pid may belong to another process by now.
    if procfs::start_time(pid) != Some(start_time) {
        return None;
    }
    Some(FoundVm {
        name: propose(found.guest_name.as_deref(), pid, taken)?,
        guest_name: found.guest_name,
        pid,
        start_time,
        executable,
        uuid: found.uuid,
        qmp: found.qmp,
        agent: found.agent,
        disks: found.disks,
        managed_by: found.managed_by,
    })
}

/// Goes by the program's file, which nobody can fake, and by the name it was called with. The kernel's
/// short name counts only where the file is hidden: a script `qemu-system-x86_64` has it too.
fn runs_qemu(program: &[u8], executable: Option<&Path>, comm: Option<String>) -> bool {
    let by_file = match executable {
        Some(path) => is_qemu(path.as_os_str().as_bytes()),
        None => comm.is_some_and(|comm| is_qemu(comm.as_bytes())),
    };
    by_file || is_qemu(program)
}

/// Whether a program's path is a system emulator's. NixOS hides the real one behind a dot.
fn is_qemu(program: &[u8]) -> bool {
    let name = program.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let name = name.strip_prefix(b".").unwrap_or(name);
    name.starts_with(b"qemu-system-") || name == b"qemu-kvm" || name == b"kvm"
}

/// Makes a [`Name`] that none of `taken` has, and takes it.
fn propose(guest_name: Option<&str>, pid: u32, taken: &mut HashSet<String>) -> Option<Name> {
    let base = guest_name.map(sanitise).filter(|name| !name.is_empty());
    let base = base.unwrap_or_else(|| format!("vm-{pid}"));
    let mut name = base.clone();
    for number in 2_u32.. {
        if taken.insert(name.clone()) {
            break;
        }
        let end = format!("-{number}");
        name = format!("{}{end}", &base[..base.len().min(MAX_NAME - end.len())]);
    }
    name.parse().ok()
}

/// Forces text into the grammar of names: ASCII only, so that bytes and characters are the same.
fn sanitise(text: &str) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let whole: String = text.chars().map(allowed).collect();
    let name = whole.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    name[..name.len().min(MAX_NAME)].trim_end_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_made_to_fit_and_unique() {
        let mut taken = HashSet::new();
        let mut name = |guest: Option<&str>| propose(guest, 42, &mut taken).unwrap().to_string();
        assert_eq!(name(Some("web 1/é")), "web-1");
        assert_eq!(name(Some("web 1")), "web-1-2");
        assert_eq!(name(Some("web-1")), "web-1-3");
        assert_eq!(name(Some("..")), "vm-42");
        assert_eq!(name(None), "vm-42-2");
        let long = "x".repeat(100);
        assert_eq!(name(Some(&long)).len(), 64);
        assert_eq!(name(Some(&long)), format!("{}-2", "x".repeat(62)));
    }

    #[test]
    fn a_program_is_known_by_its_file() {
        for (program, file, comm, expected) in [
            ("qemu-system-x86_64", Some("/usr/bin/qemu-system-x86_64"), "qemu-system-x86", true),
            ("/usr/libexec/qemu-kvm", None, "qemu-kvm", true),
            ("myvm", Some("/usr/bin/qemu-system-aarch64"), "vm-web1", true),
            ("myvm", None, "qemu-system-x86", true),
            (".qemu-system-x86_64-wrapped", None, "x", true),
            ("/bin/sh", Some("/usr/bin/dash"), "qemu-system-x86", false),
            ("qemu-img", Some("/usr/bin/qemu-img"), "qemu-img", false),
            ("kvmtool", Some("/usr/bin/lkvm"), "kvmtool", false),
        ] {
            let seen = runs_qemu(program.as_bytes(), file.map(Path::new), Some(comm.into()));
            assert_eq!(seen, expected, "{program} {file:?} {comm}");
        }
    }

    #[test]
    fn a_running_qemu_is_found() {
        use std::os::unix::net::UnixStream;
        use std::process::{Command, Stdio};
        use std::time::{Duration, Instant};

        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-name", "found by test", "-machine", "none", "-nodefaults", "-display", "none"])
            .args(["-chardev", "socket,id=c,path=qmp,server=on,wait=off", "-mon", "c,mode=control", "-S"])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let limit = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(dir.path().join("qmp")).is_err() && Instant::now() < limit {
            std::thread::yield_now();
        }
        let found = discover();
        let start = procfs::start_time(child.id());
        child.kill().unwrap();
        child.wait().unwrap();

        let vm = found.iter().find(|vm| vm.pid == child.id()).unwrap();
        assert!(vm.name.as_str().starts_with("found-by-test"));
        assert_eq!(vm.guest_name.as_deref(), Some("found by test"));
        assert_eq!(Some(vm.start_time), start);
        assert_eq!(vm.qmp, [dir.path().canonicalize().unwrap().join("qmp")]);
        assert!(vm.executable.as_ref().unwrap().ends_with("qemu-system-x86_64"));
        let names: HashSet<_> = found.iter().map(|vm| &vm.name).collect();
        assert_eq!(names.len(), found.len());
    }

    proptest! {
        #[test]
        fn any_text_gives_names(guest in ".{0,80}") {
            let mut taken = HashSet::new();
            for _ in 0..3 {
                prop_assert!(propose(Some(&guest), 1, &mut taken).is_some());
            }
        }
    }
}
