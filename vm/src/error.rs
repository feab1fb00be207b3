//! What can go wrong with a registered VM.

use std::path::PathBuf;
use std::time::Duration;

use model::{Name, OperationId};

/// A VM, its sockets, its definition or its records could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no definition of this name.
    #[error("there is no VM named {name}")]
    NoSuchVm {
        /// The name.
        name: Name,
        /// The names that there are.
        known: Vec<Name>,
    },
    /// There is no definition of this name.
    #[error("there is no pool named {name}")]
    NoSuchPool {
        /// The name.
        name: Name,
        /// The names that there are.
        known: Vec<Name>,
    },
    /// Another definition has the name.
    #[error("a pool named {name} is defined already, in another way ({})", file.display())]
    PoolNameTaken {
        /// The name.
        name: Name,
        /// Its definition.
        file: PathBuf,
    },
    /// Another pool is in the same place.
    #[error("pool {other} is in the same place ({place}) already")]
    SamePlace {
        /// That pool.
        other: Name,
        /// The place.
        place: String,
    },
    /// Another snapctl works on the pool.
    #[error("pool {pool} is busy: {source}")]
    PoolBusy {
        /// The pool.
        pool: Name,
        /// Who holds the lock.
        source: host::lock::LockError,
    },
    /// There is no definition of this name, and nothing of it is started.
    #[error("there is no network named {name}")]
    NoSuchNetwork {
        /// The name.
        name: Name,
        /// The names that there are.
        known: Vec<Name>,
    },
    /// Another definition has the name.
    #[error("a network named {name} is defined already, in another way ({})", file.display())]
    NetworkNameTaken {
        /// The name.
        name: Name,
        /// Its definition.
        file: PathBuf,
    },
    /// It has to be stopped first.
    #[error("network {name} is started")]
    NetworkStarted {
        /// The network.
        name: Name,
    },
    /// Another snapctl works on networks.
    #[error("networks are busy: {source}")]
    NetworksBusy {
        /// Who holds the lock.
        source: host::lock::LockError,
    },
    /// A network or a port could not be used.
    #[error(transparent)]
    Net(net::NetError),
    /// A volume is a disk of a VM, or holds a snapshot of one.
    #[error("{} {claim}", path.display())]
    Claimed {
        /// The volume's file or device.
        path: PathBuf,
        /// Whose it is, as the rest of "PATH …".
        claim: String,
    },
    /// A pool or a volume could not be used.
    #[error(transparent)]
    Pool(#[from] storage::PoolError),
    /// Another definition has the name.
    #[error("a VM named {name} is registered already, with other sockets ({})", file.display())]
    NameTaken {
        /// The name.
        name: Name,
        /// Its definition.
        file: PathBuf,
    },
    /// A definition cannot be understood.
    #[error("{}: {fault}", file.display())]
    BadDefinition {
        /// The definition.
        file: PathBuf,
        /// What is wrong with it.
        fault: String,
    },
    /// The VM has snapshots, so its registration is worth something.
    #[error("{vm} has {count} snapshots in the catalogue")]
    HasSnapshots {
        /// The VM.
        vm: Name,
        /// How many.
        count: usize,
    },
    /// The monitor's socket is not there, or nobody listens: QEMU does not run.
    #[error("{vm} is not running: {}", describe(source))]
    NotRunning {
        /// The VM.
        vm: Name,
        /// What connecting said.
        source: agent_client::Error,
    },
    /// The socket exists and may not be used.
    #[error("{vm}: no permission to use {}", socket.display())]
    NoPermission {
        /// The VM.
        vm: Name,
        /// The socket.
        socket: PathBuf,
        /// What connecting said.
        source: agent_client::Error,
    },
    /// Another client holds the socket. QEMU serves one at a time.
    #[error("{vm}: {} is held by another client{}", socket.display(), holders(by))]
    SocketHeld {
        /// The VM.
        vm: Name,
        /// The socket.
        socket: PathBuf,
        /// The processes that hold it, where the system tells.
        by: Vec<String>,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The monitor or the agent failed in the conversation.
    #[error("{vm}: {source}")]
    Conversation {
        /// The VM.
        vm: Name,
        /// What failed.
        source: agent_client::Error,
    },
    /// Listing the nodes would be QEMU's end (seen on 7.2 and 10.0).
    #[error(
        "{vm}: the block job {job}, a stream, has ended and was not dismissed; QEMU would crash if its nodes were looked at"
    )]
    ConcludedStream {
        /// The VM.
        vm: Name,
        /// The job.
        job: String,
    },
    /// No agent answers in the guest.
    #[error("{vm}: no guest agent answers: {why}")]
    NoAgent {
        /// The VM.
        vm: Name,
        /// What is known about it.
        why: String,
        /// What connecting said, if it came to that.
        source: Option<agent_client::Error>,
    },
    /// This QEMU lacks something.
    #[error("{vm} runs QEMU {running}, which has no {feature}; QEMU {since} and later have it")]
    MissingFeature {
        /// The VM.
        vm: Name,
        /// Its QEMU.
        running: String,
        /// What is missing.
        feature: String,
        /// The first release that has it.
        since: String,
    },
    /// No disk goes by this name.
    #[error("{vm} has no disk named {name}")]
    NoSuchDisk {
        /// The VM.
        vm: Name,
        /// The user's word.
        name: String,
        /// The names that there are.
        known: Vec<String>,
    },
    /// Several disks go by this name.
    #[error("{name} names {} disks of {vm}", disks.len())]
    AmbiguousDisk {
        /// The VM.
        vm: Name,
        /// The user's word.
        name: String,
        /// A name of each of them that no other has.
        disks: Vec<String>,
    },
    /// Another snapctl works on the VM.
    #[error("{vm} is busy: {source}")]
    Busy {
        /// The VM.
        vm: Name,
        /// Who holds the lock.
        source: host::lock::LockError,
    },
    /// The catalogue was written by a newer snapctl.
    #[error("{} has format {found}; this snapctl knows formats up to {known}", file.display())]
    NewerState {
        /// The database.
        file: PathBuf,
        /// Its format.
        found: u32,
        /// The newest that is known here.
        known: u32,
    },
    /// The catalogue could not be read or written.
    #[error("{}: {source}", file.display())]
    State {
        /// The database.
        file: PathBuf,
        /// What SQLite says.
        source: rusqlite::Error,
    },
    /// A record in the catalogue is not what this program wrote.
    #[error("{}: the record of {what} cannot be read: {fault}", file.display())]
    BadRecord {
        /// The database.
        file: PathBuf,
        /// Which record.
        what: String,
        /// What is wrong with it.
        fault: String,
    },
    /// The VM has a snapshot of this name already.
    #[error("{vm} has a snapshot named {name} already")]
    SnapshotNameTaken {
        /// The VM.
        vm: Name,
        /// The name.
        name: Name,
    },
    /// The operation is not in the journal any more.
    #[error("operation {0} is not in the journal")]
    NoSuchOperation(OperationId),
    /// A file of snapctl's could not be used.
    #[error(transparent)]
    Host(#[from] host::Error),
}

impl Error {
    /// Wraps what a conversation said about `vm`.
    pub fn conversation(vm: &Name) -> impl FnOnce(agent_client::Error) -> Self {
        let vm = vm.clone();
        move |source| Self::Conversation { vm, source }
    }
}

fn describe(source: &agent_client::Error) -> String {
    match source {
        agent_client::Error::Connect { path, source } => match source.kind() {
            std::io::ErrorKind::NotFound => format!("there is no socket {}", path.display()),
            std::io::ErrorKind::ConnectionRefused => {
                format!("nobody listens on {} (a socket file that a dead QEMU left)", path.display())
            }
            _ => source.to_string(),
        },
        other => other.to_string(),
    }
}

fn holders(by: &[String]) -> String {
    if by.is_empty() { String::new() } else { format!(": {}", by.join(", ")) }
}
