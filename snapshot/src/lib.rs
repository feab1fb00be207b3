//! Points in time: taking a snapshot, looking at snapshots, and finishing what was interrupted.
//!
//! One flow, in one direction: what QEMU shows ([`vm::Machine`]) and what the user asks ([`CreateRequest`])
//! make a [`CreatePlan`], a value that can be printed and tested; [`create()`] journals it, carries it out
//! step by step, and looks. Up to the step that makes the point everything is undone on failure; from
//! there on everything is finished, by the same process or by [`recover()`].

mod aside;
mod bitmaps;
mod copy;
mod create;
mod daemon;
mod deep;
mod encrypted;
mod error;
mod frozen;
mod internal;
mod jobs;
mod lineage;
mod memory;
mod merge;
mod overlays;
mod pause;
mod plan;
mod platform;
mod point;
mod qemu_img;
mod recover;
mod retention;
mod revert;
mod target;
mod view;

pub use aside::{AsidePlan, create_aside, plan_aside};
pub use bitmaps::BitmapPlan;
pub use copy::{CopiedDisk, CopyPlan, CopyRequest, copy, plan_copy};
pub use create::{Created, Guards, Interrupt, MAX_FREEZE_LIMIT, Warning, create, plan_create};
pub use deep::{WatchReading, check_deep};
pub use encrypted::blockdev;
pub use error::{Error, Fate, StepError};
pub use frozen::forget_frozen;
pub use internal::{
    InternalPlan, InternalRevert, create_internal, plan_internal, plan_revert_internal, revert_internal,
};
pub use lineage::went_on_in;
pub use memory::{MemoryPlan, MemoryWish, Settings};
pub use merge::{
    DEFAULT_MAX_PAUSE, DEFAULT_WAIT_FOR_ROOM, DiskMerges, Going, Limits, Merge, MergePlan, MergeRequest,
    Progress, SettledMerge, Staying, Watch, merge, plan_merge,
};
pub use pause::resume_guard_main;
pub use plan::{CreatePlan, CreateRequest, DEFAULT_MAX_FREEZE, DiskPlan, FreezePlan, Refusal, SkippedDisk};
pub use point::GuardProgram;
pub use recover::{Recovered, recover, recover_stopped};
pub use retention::{Rules, Verdict, judge};
pub use revert::{RevertDisk, RevertPlan, RevertRequest, Reverted, plan_revert, revert};
pub use target::{Target, Tools};
pub use view::{BranchView, DiskView, LayerView, check_chains, disk_views, find_snapshot};
