//! One VM: its lock, its monitor, its agent, and what it looks like now.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_client::{
    Agent, BlockGraph, BlockInfo, BlockNode, COMMAND_LIMIT, ChardevInfo, GREETING_LIMIT, JobInfo,
    MigrationInfo, Qmp, QueryBlock, QueryBlockGraph, QueryChardev, QueryJobs, QueryMigrate,
    QueryNamedBlockNodes, QueryStatus, RunState, SYNC_LIMIT, holder,
};
use host::lock::{FileLock, LockError};
use model::Name;

use crate::disks::{self, Disk};
use crate::platform::{self, Platform};
use crate::{Error, Paths, Registry, VmDefinition};

/// One VM under its lock, with its monitor connected.
#[derive(Debug)]
pub struct Session {
    /// The VM's name.
    pub vm: Name,
    /// Its definition.
    pub definition: VmDefinition,
    /// Its monitor.
    pub qmp: Qmp,
    /// Where things are.
    pub paths: Paths,
    /// How long to wait for others to let go of a socket.
    pub wait: Option<Duration>,
    /// How long a command may take.
    pub timeout: Duration,
    _lock: FileLock,
}

/// A running VM as QEMU shows it at one moment.
#[derive(Debug)]
pub struct Machine {
    /// Whether the guest runs.
    pub status: RunState,
    /// Its drives.
    pub disks: Vec<Disk>,
    /// The nodes of its block graph.
    pub nodes: Vec<BlockNode>,
    /// The edges.
    pub graph: BlockGraph,
    /// Its jobs, concluded ones included.
    pub jobs: Vec<JobInfo>,
    /// How a migration goes.
    pub migration: MigrationInfo,
    /// Its character devices.
    pub chardevs: Vec<ChardevInfo>,
    /// Its drives as QEMU lists them.
    pub blocks: Vec<BlockInfo>,
    /// QEMU's process, where the socket tells.
    pub pid: Option<u32>,
    /// Its working directory, where the system tells.
    pub cwd: Option<PathBuf>,
}

impl Session {
    /// Takes the VM's lock and connects its monitor, waiting at most `wait` for others to let go.
    ///
    /// # Errors
    /// [`Error::NoSuchVm`]; [`Error::Busy`]; and as [`open_monitor`].
    pub async fn open(
        paths: &Paths,
        vm: &Name,
        wait: Option<Duration>,
        timeout: Duration,
    ) -> Result<Self, Error> {
        Registry::<VmDefinition>::new(paths).load(vm)?;
        let lock = lock(paths, vm, wait).await?;
        Self::with_lock(paths, vm, lock, wait, timeout).await.map_err(|(fault, _)| fault)
    }

    /// As [`Session::open`], with a lock that was taken before.
    ///
    /// # Errors
    /// As [`Session::open`]; the lock comes back with the error.
    pub async fn with_lock(
        paths: &Paths,
        vm: &Name,
        lock: FileLock,
        wait: Option<Duration>,
        timeout: Duration,
    ) -> Result<Self, (Error, FileLock)> {
        let definition = match Registry::new(paths).load(vm) {
            Ok(definition) => definition,
            Err(fault) => return Err((fault, lock)),
        };
        match open_monitor(vm, &definition, wait, timeout).await {
            Ok(qmp) => {
                Ok(Self { vm: vm.clone(), definition, qmp, paths: paths.clone(), wait, timeout, _lock: lock })
            }
            Err(fault) => Err((fault, lock)),
        }
    }

    /// What the VM looks like now.
    ///
    /// # Errors
    /// [`Error::Conversation`].
    pub async fn observe(&self) -> Result<Machine, Error> {
        observe(&self.vm, &self.definition, &self.qmp).await
    }

    /// What the VM keeps beside its disks.
    ///
    /// # Errors
    /// [`Error::Conversation`].
    pub async fn platform(&self, machine: &Machine) -> Result<Platform, Error> {
        platform::observe(&self.qmp, machine).await.map_err(Error::conversation(&self.vm))
    }
}

/// Takes the lock of `vm`: one operation at a time for each VM.
///
/// # Errors
/// [`Error::Busy`] after `wait`; [`Error::Host`].
pub async fn lock(paths: &Paths, vm: &Name, wait: Option<Duration>) -> Result<FileLock, Error> {
    FileLock::acquire(&paths.vm_lock(vm), wait).await.map_err(|fault| match fault {
        LockError::Host(fault) => fault.into(),
        busy => Error::Busy { vm: vm.clone(), source: busy },
    })
}

/// Connects the monitor of `vm`, waiting at most `wait` for another client to let go of it.
///
/// # Errors
/// [`Error::NotRunning`], [`Error::NoPermission`], [`Error::SocketHeld`] by what the socket tells;
/// [`Error::Conversation`] for anything else.
pub async fn open_monitor(
    vm: &Name,
    definition: &VmDefinition,
    wait: Option<Duration>,
    timeout: Duration,
) -> Result<Qmp, Error> {
    let patience = wait.unwrap_or_default().max(GREETING_LIMIT);
    let connected = Qmp::connect(&definition.qmp, patience, timeout).await;
    connected.map_err(|source| match source {
        agent_client::Error::NoGreeting { ref path, after } if is_held(path) => held(vm, path, after),
        other => unreachable(vm, &definition.qmp, other),
    })
}

/// Connects the agent of `vm`. `chardevs` is what QEMU says of its channels, where it was asked.
///
/// # Errors
/// [`Error::NoAgent`] with what is known about it; [`Error::NoPermission`]; [`Error::SocketHeld`].
pub async fn open_agent(
    vm: &Name,
    definition: &VmDefinition,
    chardevs: &[ChardevInfo],
    wait: Option<Duration>,
    timeout: Duration,
) -> Result<Agent, Error> {
    let none = |why: String, source| Error::NoAgent { vm: vm.clone(), why, source };
    let Some(path) = &definition.agent else {
        return Err(none("the definition names no agent socket".into(), None));
    };
    let channel = chardevs.iter().find(|chardev| names_socket(chardev, path));
    if channel.is_some_and(|chardev| !chardev.frontend_open) {
        return Err(none("nothing in the guest has the agent's port open".into(), None));
    }
    if wait.is_none() && channel.is_some_and(|chardev| !chardev.filename.starts_with("disconnected:")) {
        return Err(held(vm, path, Duration::ZERO));
    }
    let patience = wait.unwrap_or_default().max(SYNC_LIMIT);
    Agent::connect(path, patience, timeout).await.map_err(|source| match source {
        agent_client::Error::Timeout { after, .. } if !holder::holders(path).list.is_empty() => {
            held(vm, path, after)
        }
        agent_client::Error::Timeout { after, .. } => {
            none(format!("it did not answer a sync within {after:?}"), Some(source))
        }
        agent_client::Error::Connect { .. } => match unreachable(vm, path, source) {
            Error::NotRunning { source, .. } => none("its socket is not served".into(), Some(source)),
            other => other,
        },
        other => none(other.to_string(), Some(other)),
    })
}

/// Asks QEMU for everything that plans are made of, in one go.
///
/// # Errors
/// [`Error::Conversation`]; [`Error::ConcludedStream`], without asking for the nodes.
pub async fn observe(vm: &Name, definition: &VmDefinition, qmp: &Qmp) -> Result<Machine, Error> {
    let jobs = qmp.execute(&QueryJobs {}).await.map_err(Error::conversation(vm))?;
    if let Some(job) = jobs.iter().find(|job| job.kind == "stream" && job.status == "concluded") {
        return Err(Error::ConcludedStream { vm: vm.clone(), job: job.id.clone() });
    }
    let asked = tokio::try_join!(
        qmp.execute(&QueryStatus {}),
        qmp.execute(&QueryBlock {}),
        qmp.execute(&QueryNamedBlockNodes { flat: true }),
        qmp.execute(&QueryBlockGraph {}),
        qmp.execute(&QueryMigrate {}),
        qmp.execute(&QueryChardev {}),
    );
    let (status, blocks, nodes, graph, migration, chardevs) = asked.map_err(Error::conversation(vm))?;
    let pid = qmp.peer_pid().filter(|pid| is_qemu(*pid));
    let cwd = pid.and_then(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).ok());
    let mut disks = disks::find(definition, &blocks, &nodes, &graph, cwd.as_deref());
    for disk in &mut disks {
        // Links may move; the overlay's header and the journal hold the file's own place.
        if let disks::Content::Layer(layer) = &mut disk.content {
            let below = layer.below.iter_mut().filter_map(|lower| lower.path.as_mut());
            for path in std::iter::once(&mut layer.path).chain(below) {
                if let Ok(real) = storage::real_path(path) {
                    *path = real;
                }
            }
        }
    }
    Ok(Machine { status, disks, nodes, graph, jobs, migration, chardevs, blocks, pid, cwd })
}

impl Machine {
    /// Whether QEMU has the file at `path` open, by device and inode: a path alone may name another file
    /// by now, or none. None where the system does not tell (another user's process).
    pub fn has_open(&self, path: &Path) -> Option<bool> {
        let wanted = match std::fs::metadata(path) {
            Err(fault) if fault.kind() == io::ErrorKind::NotFound => return Some(false),
            found => found.ok()?,
        };
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.pid?)).ok()?;
        let open: HashSet<(u64, u64)> = descriptors
            .filter_map(|entry| std::fs::metadata(entry.ok()?.path()).ok())
            .map(|open| disks::identity(&open))
            .collect();
        Some(open.contains(&disks::identity(&wanted)))
    }

    /// The nodes through which QEMU has the file at `path` open: see [`disks::nodes_on`].
    pub fn nodes_on(&self, path: &Path) -> Vec<String> {
        disks::nodes_on(&self.nodes, &self.graph, self.cwd.as_deref(), path)
    }

    /// Whether a disk of the VM has the image at `path` as its active layer.
    pub fn runs_on(&self, path: &Path) -> bool {
        self.disks.iter().filter_map(Disk::layer).any(|layer| layer.path == path)
    }

    /// Jobs that use the node `name` now.
    pub fn jobs_on(&self, name: &str) -> Vec<&str> {
        let id_of = |name: &str| self.graph.nodes.iter().find(|node| node.name == name).map(|node| node.id);
        let Some(node) = id_of(name) else { return Vec::new() };
        let users = self.graph.edges.iter().filter(|edge| edge.child == node).map(|edge| edge.parent);
        let users: HashSet<u64> = users.collect();
        let jobs =
            self.graph.nodes.iter().filter(|node| node.kind == "block-job" && users.contains(&node.id));
        jobs.map(|job| job.name.as_str()).collect()
    }
}

fn names_socket(chardev: &ChardevInfo, path: &Path) -> bool {
    // `disconnected:unix:PATH,server=on`, or `unix:PATH,server=on` while a client is there.
    let text = chardev.filename.strip_prefix("disconnected:").unwrap_or(&chardev.filename);
    let Some(socket) = text.strip_prefix("unix:") else { return false };
    let socket = socket.split(',').next().unwrap_or(socket);
    Path::new(socket) == path || same_file(Path::new(socket), path)
}

fn same_file(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|meta| disks::identity(&meta));
    identity(a).is_some_and(|a| Some(a) == identity(b))
}

/// Whether the process is a QEMU: a socket may have been made by a service manager.
fn is_qemu(pid: u32) -> bool {
    let exe = std::fs::read_link(format!("/proc/{pid}/exe"));
    let name = exe.ok().and_then(|exe| exe.file_name().map(|name| name.to_string_lossy().into_owned()));
    let comm = || std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let name = name.unwrap_or_else(comm);
    name.contains("qemu") || name.contains("kvm")
}

/// Whether another client holds the socket, or may: the system does not tell everybody.
fn is_held(socket: &Path) -> bool {
    let holders = holder::holders(socket);
    !holders.list.is_empty() || !holders.certain
}

fn held(vm: &Name, socket: &Path, waited: Duration) -> Error {
    let holders = holder::holders(socket).list;
    let by = holders.iter().map(|holder| format!("pid {} ({})", holder.pid, holder.comm)).collect();
    Error::SocketHeld { vm: vm.clone(), socket: socket.to_owned(), by, waited }
}

fn unreachable(vm: &Name, socket: &Path, source: agent_client::Error) -> Error {
    let kind = match &source {
        agent_client::Error::Connect { source, .. } => Some(source.kind()),
        _ => None,
    };
    match kind {
        Some(io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            Error::NotRunning { vm: vm.clone(), source }
        }
        Some(io::ErrorKind::PermissionDenied) => {
            Error::NoPermission { vm: vm.clone(), socket: PathBuf::from(socket), source }
        }
        _ => Error::Conversation { vm: vm.clone(), source },
    }
}

/// How long a command may take unless the user says otherwise.
pub const DEFAULT_TIMEOUT: Duration = COMMAND_LIMIT;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chardev_is_found_by_its_socket() {
        let chardev = |filename: &str| ChardevInfo {
            label: "q".into(),
            filename: filename.into(),
            frontend_open: true,
        };
        for text in ["disconnected:unix:/run/a,server=on", "unix:/run/a,server=on", "unix:/run/a"] {
            assert!(names_socket(&chardev(text), Path::new("/run/a")), "{text}");
        }
        assert!(!names_socket(&chardev("unix:/run/ab"), Path::new("/run/a")));
        assert!(!names_socket(&chardev("pty:/dev/pts/1"), Path::new("/run/a")));
    }
}
