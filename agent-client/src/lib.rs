//! Clients for QEMU's QMP monitor and for the guest agent, and the guard that thaws.
//!
//! - [`Qmp`] and [`Agent`] speak over one [`Connection`]: bounded messages, any number of commands under
//!   way, timeouts that leave the stream sound, descriptors beside a command.
//! - [`Guard`] is the hold on a frozen guest: a process of its own that thaws when its parent dies, when
//!   the limit passes, and behind a freeze that answers too late.
//! - [`discover`] finds running QEMUs; [`holder`] tells who holds a socket.
//!
//! A peer's words are data. Whatever an agent says is bounded in size, depth and time, and is made fit
//! for a terminal before it becomes part of a message.

mod agent;
mod command;
pub mod discover;
mod error;
mod frame;
mod guard;
pub mod holder;
pub mod procfs;
mod qmp;
mod schema;
mod transport;

pub use agent::{
    AGENT_COMMAND_LIMIT, Agent, AgentInfo, Filesystem, FreezeStatus, GuestAddress, GuestInterface, MAX_ITEMS,
    OsInfo, SYNC_LIMIT, TrimResult,
};
pub use command::{
    BitmapOfNode, BlockCommit, BlockGraph, BlockInfo, BlockJobInfo, BlockJobSetSpeed, BlockNode, BlockStream,
    BlockdevAdd, BlockdevCreate, BlockdevDel, BlockdevMirror, CacheInfo, ChardevInfo, CloseFd, Cont,
    DirtyBitmap, FdsetFd, FdsetInfo, FormatSpecific, GraphEdge, GraphNode, HumanMonitorCommand, ImageInfo,
    InternalSnapshot, JobCancel, JobComplete, JobDismiss, JobFinalize, JobInfo, JobResume, MemorySize,
    Migrate, MigrateCancel, MigrateContinue, MigrateSetCapabilities, MigrateSetParameters,
    MigrationCapability, MigrationInfo, MigrationParameters, MigrationRam, ObjectProperty, QomGet, QomList,
    QueryBlock, QueryBlockGraph, QueryBlockJobs, QueryChardev, QueryFdsets, QueryJobs,
    QueryMemorySizeSummary, QueryMigrate, QueryMigrateCapabilities, QueryMigrateParameters, QueryName,
    QueryNamedBlockNodes, QueryStatus, QueryTpm, RemoveFd, RunState, SetAction, SnapshotDelete, SnapshotLoad,
    SnapshotSave, Stop, SystemReset, TpmInfo, Transaction, TransactionAction, VmName,
};
pub use error::{CloseReason, Error, Excerpt, Refusal, printable};
pub use frame::{LimitExceeded, Limits};
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub use guard::fuzz_guard;
pub use guard::{Frozen, Guard, GuardError, GuardRequest, THAW_GRACE, Thawed, guard_main, monotonic_ns};
pub use qmp::{COMMAND_LIMIT, GREETING_LIMIT, Qmp, Version, VersionTriple, decode};
pub use schema::{Mismatch, Schema};
pub use transport::{Connection, Event, MAX_FDS, Matching, Prepared};
