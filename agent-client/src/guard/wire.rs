//! What the guard and its parent say to each other: one JSON object a line, over a socket pair.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The parent's first line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Task {
    /// Where the agent listens, for a second connection if the first one breaks.
    pub agent: PathBuf,
    /// The mount points to freeze; all file systems if empty.
    pub mountpoints: Vec<String>,
    /// How long the freeze may hold, in nanoseconds from the moment its command is sent.
    pub limit_ns: u64,
}

/// The parent's later lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Freeze now.
    Freeze,
    /// Thaw now.
    Thaw,
}

/// The guard's lines. Times are nanoseconds of `CLOCK_MONOTONIC`, which all processes share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Report {
    /// The guard has its task and waits.
    Ready,
    /// The agent confirmed the freeze.
    Frozen {
        /// File systems frozen.
        filesystems: u64,
        /// When the command was sent.
        sent_ns: u64,
        /// When it was confirmed.
        confirmed_ns: u64,
    },
    /// The freeze failed. A thaw is on its way all the same.
    Failed {
        /// Why.
        reason: String,
    },
    /// The limit passed. A thaw is on its way.
    Expired,
    /// The agent confirmed the thaw. The guard ends.
    Thawed {
        /// File systems thawed, where one thaw was enough.
        filesystems: Option<u64>,
        /// When the thaw that was confirmed was sent for the first time.
        sent_ns: u64,
        /// When it was confirmed.
        confirmed_ns: u64,
    },
    /// QEMU is gone, and with it the guest. The guard ends.
    Gone,
}

/// Now, in nanoseconds of `CLOCK_MONOTONIC`.
///
/// Source: clock_gettime(2).
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
