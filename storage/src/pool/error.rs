//! What can go wrong with a pool or a volume.

use std::path::PathBuf;

use host::Error as HostError;
use host::program::ProgramError;
use host::watch::Interrupted;
use model::{ByteSize, Name};

use super::VolumeFormat;
use crate::chain::ChainError;
use crate::qcow2::Qcow2Error;
use crate::space::SpaceError;
use crate::vmdk::VmdkError;

/// A pool or a volume could not be used. Unless a variant says otherwise, nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// A file could not be used.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A program failed, or is not there.
    #[error(transparent)]
    Program(ProgramError),
    /// A test asked for a failure.
    #[error(transparent)]
    Fault(#[from] host::fault::Fault),
    /// A signal asked to end; what was made is removed.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
    /// No kind of pool has this name.
    #[error("{text:?} is no kind of pool")]
    NoSuchKind {
        /// The user's word.
        text: String,
    },
    /// The definition is wrong.
    #[error("pool {pool}: {fault}")]
    BadDefinition {
        /// The pool.
        pool: Name,
        /// What is wrong with it.
        fault: String,
    },
    /// The place is not what the pool was defined on, or is not there.
    #[error("pool {pool} cannot be used: {why}")]
    WrongPlace {
        /// The pool.
        pool: Name,
        /// What was found.
        why: String,
    },
    /// The pool is not started.
    #[error("pool {pool} is not started: {why}")]
    NotStarted {
        /// The pool.
        pool: Name,
        /// What is missing.
        why: String,
    },
    /// There is no volume of this name.
    #[error("pool {pool} has no volume named {volume}")]
    NoSuchVolume {
        /// The pool.
        pool: Name,
        /// The user's word.
        volume: Name,
        /// The names that there are.
        known: Vec<Name>,
    },
    /// What the volume says about itself cannot be, or leads elsewhere.
    #[error("volume {volume} of pool {pool} cannot be used: {fault}")]
    Broken {
        /// The pool.
        pool: Name,
        /// The volume.
        volume: Name,
        /// What is wrong.
        fault: String,
    },
    /// Another volume has the name.
    #[error("pool {pool} has a volume named {volume} already")]
    VolumeExists {
        /// The pool.
        pool: Name,
        /// The name.
        volume: Name,
    },
    /// The name cannot be one here.
    #[error("{volume} cannot be the name of a volume in pool {pool}: {why}")]
    BadName {
        /// The pool.
        pool: Name,
        /// The name.
        volume: Name,
        /// Why.
        why: String,
    },
    /// This pool cannot do it.
    #[error("pool {pool} (of kind {kind}) cannot {what}")]
    Unsupported {
        /// The pool.
        pool: Name,
        /// Its kind.
        kind: &'static str,
        /// What was asked of it.
        what: String,
    },
    /// What was asked does not go together.
    #[error("{0}")]
    Contradiction(String),
    /// Somebody uses the volume.
    #[error("volume {volume} is in use: {by}")]
    InUse {
        /// The volume.
        volume: Name,
        /// By whom.
        by: String,
    },
    /// Somebody uses the pool.
    #[error("pool {pool} is in use: {by}")]
    PoolInUse {
        /// The pool.
        pool: Name,
        /// By whom.
        by: String,
    },
    /// The volume was not made by snapctl, so it is left alone.
    #[error("{} was not made by snapctl", path.display())]
    Foreign {
        /// The volume.
        path: PathBuf,
        /// What would make it snapctl's.
        adopt: String,
    },
    /// Other volumes stand on it.
    #[error("volume {volume} is the backing file of {}", overlays.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "))]
    HasOverlays {
        /// The volume.
        volume: Name,
        /// What stands on it.
        overlays: Vec<PathBuf>,
    },
    /// A chain is not one that may be followed.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// An image's header has a fault.
    #[error(transparent)]
    Qcow2(#[from] Qcow2Error),
    /// A VMDK's descriptor has a fault, or names files that it must not.
    #[error(transparent)]
    Vmdk(#[from] VmdkError),
    /// The image is encrypted in QEMU's old way, which is not safe, and which QEMU itself does not run any more.
    #[error("{} is encrypted with AES, which is not safe", path.display())]
    Aes {
        /// The image.
        path: PathBuf,
    },
    /// The content begins like another format than the one that was named.
    #[error("{} begins like a {looks} image, and was given as {format}", path.display())]
    LooksOther {
        /// The image.
        path: PathBuf,
        /// What it was given as.
        format: VolumeFormat,
        /// What it looks like.
        looks: VolumeFormat,
    },
    /// The format of a file is not known, and formats are not guessed.
    #[error("the format of {} is not told by its name", path.display())]
    FormatUnknown {
        /// The file.
        path: PathBuf,
    },
    /// Not enough room.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// The pool has less room than is needed.
    #[error("pool {pool} has {available} left, {needed} are needed")]
    Full {
        /// The pool.
        pool: Name,
        /// What is needed.
        needed: ByteSize,
        /// What is left.
        available: ByteSize,
    },
    /// A thin pool is so full that its own end is near.
    #[error(
        "the {what} of thin pool {pool} is {used:.1} % full; new volumes and snapshots are refused from {limit} % on"
    )]
    OverThreshold {
        /// The pool.
        pool: Name,
        /// `data` or `metadata`.
        what: &'static str,
        /// How full it is, in percent.
        used: f64,
        /// The threshold, in percent.
        limit: f64,
    },
    /// A smaller size would cut data off.
    #[error("volume {volume} has {now}, and {wanted} would cut off what is behind")]
    WouldShrink {
        /// The volume.
        volume: Name,
        /// Its size.
        now: ByteSize,
        /// The size asked for.
        wanted: ByteSize,
    },
    /// The file that would be written is there.
    #[error("{} exists already", path.display())]
    TargetExists {
        /// The file.
        path: PathBuf,
    },
    /// A program printed something else than it should.
    #[error("{program} printed what cannot be read: {fault}")]
    Unreadable {
        /// The program.
        program: &'static str,
        /// What is wrong.
        fault: String,
    },
    /// The copy differs from what was copied.
    #[error("{} does not read back as what was written: {what}", path.display())]
    Differs {
        /// The new volume, which is removed again.
        path: PathBuf,
        /// What differs.
        what: String,
    },
}

impl From<ProgramError> for PoolError {
    fn from(fault: ProgramError) -> Self {
        match fault {
            // Whoever was at work when the signal came.
            ProgramError::Interrupted(signal) => Self::Interrupted(signal),
            other => Self::Program(other),
        }
    }
}

/// Refuses a volume that somebody has open.
///
/// # Errors
/// [`PoolError::InUse`]; [`PoolError::Host`].
pub(crate) fn refuse_open(volume: &Name, path: &std::path::Path) -> Result<(), PoolError> {
    match host::open_files::user_of(path)?.describe(path.display()) {
        None => Ok(()),
        Some(by) => Err(PoolError::InUse { volume: volume.clone(), by }),
    }
}
