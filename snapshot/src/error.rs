//! How taking, looking at or recovering snapshots can fail, and what that leaves behind.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use agent_client::GuardError;
use host::fault::Fault;
use model::{Name, OperationId};
use storage::overlay::OverlayError;
use storage::space::SpaceError;

use crate::plan::Refusal;

/// An operation on snapshots failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VM, its sockets or the catalogue could not be used. Nothing was changed.
    #[error(transparent)]
    Vm(#[from] vm::Error),
    /// It would have been unsafe, or makes no sense. Nothing was changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A step failed.
    #[error("{step} failed: {source}; {fate}")]
    Step {
        /// What was being done.
        step: String,
        /// Why it failed.
        source: StepError,
        /// What it leaves behind.
        fate: Fate,
    },
    /// The guest could not be quiesced, and the user required it.
    #[error("{vm} could not be quiesced: {reason}; {fate}")]
    NotQuiesced {
        /// The VM.
        vm: Name,
        /// Why.
        reason: String,
        /// What it leaves behind.
        fate: Fate,
    },
    /// The guest may still be frozen.
    #[error("{vm} may still be frozen: {source}; {}", taken(snapshot.as_ref(), fate))]
    ThawUnconfirmed {
        /// The VM.
        vm: Name,
        /// What is known.
        source: GuardError,
        /// The snapshot, if it was taken.
        snapshot: Option<Name>,
        /// What else it leaves behind.
        fate: Fate,
    },
    /// A signal came.
    #[error("interrupted by {}; {fate}", signal_name(*signal))]
    Interrupted {
        /// Its number.
        signal: i32,
        /// What it leaves behind.
        fate: Fate,
    },
    /// There is no such snapshot.
    #[error("{vm} has no snapshot {wanted}")]
    NoSuchSnapshot {
        /// The VM.
        vm: Name,
        /// The user's word.
        wanted: String,
        /// The names that there are.
        known: Vec<Name>,
    },
    /// Several snapshots fit.
    #[error("{wanted} could be any of {} snapshots of {vm}", matches.len())]
    Ambiguous {
        /// The VM.
        vm: Name,
        /// The user's word.
        wanted: String,
        /// What fits.
        matches: Vec<Name>,
    },
    /// An interrupted operation could not be finished or undone.
    #[error("operation {operation} on {vm} ({kind}) was interrupted and cannot be settled yet: {why}")]
    Unsettled {
        /// The VM.
        vm: Name,
        /// The operation.
        operation: OperationId,
        /// Its kind.
        kind: String,
        /// What is in the way.
        why: String,
    },
}

/// What a failed operation leaves behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Nothing was changed.
    Untouched,
    /// Everything was undone.
    Undone,
    /// Some of it could not be undone.
    PartlyUndone(Vec<String>),
    /// The point in time may be made or is made, and the rest is not done.
    Interrupted(String),
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Untouched => f.write_str("nothing was changed"),
            Self::Undone => f.write_str("everything was undone"),
            Self::PartlyUndone(left) => write!(f, "it was partly undone; left behind: {}", left.join(", ")),
            Self::Interrupted(stands) => write!(f, "it is interrupted: {stands}"),
        }
    }
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The overlay's file.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// Too little room.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// QEMU or the agent.
    #[error(transparent)]
    Conversation(#[from] agent_client::Error),
    /// A file.
    #[error(transparent)]
    Host(#[from] host::Error),
    /// The thaw guard.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The journal or the catalogue.
    #[error(transparent)]
    State(#[from] vm::Error),
    /// A test made it fail.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// QEMU's job failed.
    #[error("QEMU's job {job} failed: {error}")]
    Job {
        /// The job.
        job: String,
        /// What QEMU says.
        error: String,
    },
    /// QEMU's job does not end.
    #[error("QEMU's job {job} is still not done after {after:?}")]
    JobSlow {
        /// The job.
        job: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// QEMU does not know the job any more, though nobody told it to forget it.
    #[error("QEMU's job {job} is gone, and how it ended is not known")]
    JobGone {
        /// The job.
        job: String,
    },
    /// The guest writes faster than the job copies, also while it is held for moments.
    #[error(
        "the guest writes faster than its layer can be merged, though it was held for up to {paused:?} at a time"
    )]
    NotConverging {
        /// The longest time for which it may be held.
        paused: Duration,
    },
    /// A job ended without an error, and the chain is as before.
    #[error("QEMU's job {job} ended, and its layers are not merged")]
    NotMerged {
        /// The job.
        job: String,
    },
    /// QEMU could not write back what it holds of a layer.
    #[error("QEMU could not flush {}: {said}", path.display())]
    NotFlushed {
        /// The layer.
        path: PathBuf,
        /// What QEMU says.
        said: String,
    },
    /// QEMU has a layer open that its disks do not use any more.
    #[error("QEMU still has {} open, though no disk stands on it", path.display())]
    StillOpen {
        /// The layer.
        path: PathBuf,
    },
    /// The storage daemon, which merges layers that no VM has open.
    #[error("qemu-storage-daemon failed: {0}")]
    Daemon(String),
    /// A job that saves inside images ended without an error, and one of them does not have it.
    #[error("{} does not have the snapshot inside, though QEMU saved it", path.display())]
    NotInside {
        /// The image.
        path: PathBuf,
    },
    /// The memory could not be saved.
    #[error("the memory could not be saved: {0}")]
    Memory(String),
    /// The guard that lets a held guest go on could not be started. The guest was not held.
    #[error("the resume guard could not be started: {0}")]
    ResumeGuard(std::io::Error),
    /// The guest was told to go on, and still stands.
    #[error("the guest does not go on; the resume guard keeps trying")]
    StillPaused,
    /// QEMU did not say that it reset the guest.
    #[error("QEMU did not reset the guest within {after:?}")]
    NotReset {
        /// How long it was waited for.
        after: Duration,
    },
    /// The program that changes a header where no QEMU has the image open.
    #[error("qemu-img failed: {0}")]
    QemuImg(String),
    /// A chain cannot be followed.
    #[error(transparent)]
    Chain(#[from] storage::chain::ChainError),
    /// QEMU has another file open than the path names.
    #[error("{} is not the file that QEMU has open under that name; was it replaced or moved?", .0.display())]
    OtherFile(PathBuf),
    /// After the transaction, a disk does not run on its overlay.
    #[error("disk {disk} does not run on {}", overlay.display())]
    NotSwitched {
        /// The disk.
        disk: String,
        /// The overlay.
        overlay: PathBuf,
    },
    /// A signal came.
    #[error("interrupted by {}", signal_name(*.0))]
    Signal(i32),
    /// A process uses an image that has to be free.
    #[error("process {pid} has {} open", path.display())]
    InUse {
        /// The image.
        path: PathBuf,
        /// The process.
        pid: u32,
    },
    /// A QEMU that cannot be looked into may use an image that has to be free.
    #[error(
        "process {pid} is a QEMU of another user, and may have {} open; run this as root",
        path.display()
    )]
    MaybeInUse {
        /// The image.
        path: PathBuf,
        /// The process.
        pid: u32,
    },
    /// The VM was started on the layers from before the point, and the overlays hold what came after it.
    #[error(
        "the VM was started on its old layers, but the snapshot was taken, and {overlays} hold what the guest \
         wrote after it; stop the VM at once, run this again, and start it from what 'snapctl disk path' says"
    )]
    OldLayers {
        /// The overlays.
        overlays: String,
    },
    /// The guest may be frozen, and was not thawed.
    #[error("the guest may be frozen, and cannot be thawed: {0}")]
    NotThawed(String),
    /// Some of it could not be taken back.
    #[error("left behind: {}", .0.join(", "))]
    LeftBehind(Vec<String>),
    /// An overlay's header cannot be understood.
    #[error(transparent)]
    Header(#[from] storage::qcow2::Qcow2Error),
}

/// `SIGINT` and its kind by name.
fn signal_name(signal: i32) -> String {
    match signal {
        1 => "SIGHUP".into(),
        2 => "SIGINT".into(),
        15 => "SIGTERM".into(),
        other => format!("signal {other}"),
    }
}

fn taken(snapshot: Option<&Name>, fate: &Fate) -> String {
    match snapshot {
        Some(name) => format!("snapshot {name} was taken and entered"),
        None => fate.to_string(),
    }
}
