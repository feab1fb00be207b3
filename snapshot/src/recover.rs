//! Settling what was interrupted.
//!
//! The journal says what was to be done; QEMU and the files say what is. Every disk on its overlay: the
//! point is made, so the rest is done. No disk on it: everything is undone. Nothing between these can be,
//! since all disks change in one transaction.

use std::path::{Path, PathBuf};

use agent_client::BlockGraph;
use host::open_files::{Users, user_of};
use jiff::Timestamp;
use model::{Name, SnapshotRecord};
use serde::Serialize;
use storage::{Inode, qcow2};
use vm::{Machine, PendingOperation, Session, State};

use crate::aside;
use crate::create::{Warning, enter, enter_verified};
use crate::error::{Error, StepError};
use crate::frozen::{self, Thaw};
use crate::internal;
use crate::memory::{self, Memory};
use crate::merge::{self, SettledMerge};
use crate::overlays;
use crate::plan::{CreatePlan, DiskPlan};
use crate::platform;
use crate::point::Point;
use crate::revert;

/// How an interrupted operation was settled.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum Recovered {
    /// The point was made, and the rest is done now.
    Finished {
        /// The snapshot.
        snapshot: Box<SnapshotRecord>,
    },
    /// No point was made; nothing of it is left.
    Undone {
        /// The name that the snapshot was to have.
        name: Name,
    },
    /// A guest that may have been frozen since is thawed, or has ended.
    Thawed {
        /// The VM.
        vm: Name,
    },
    /// A guest may still be frozen, and nobody can thaw it now.
    MayBeFrozen {
        /// The VM.
        vm: Name,
        /// What is in the way.
        why: String,
    },
    /// A revert is finished, or undone.
    Reverted {
        /// The VM.
        vm: Name,
        /// The snapshot.
        snapshot: Name,
        /// Whether the VM went back.
        done: bool,
    },
    /// What was under way of a deletion or a flattening is at its end.
    Merged(SettledMerge),
}

/// Settles every interrupted operation on the VM behind `session`, oldest first.
///
/// # Errors
/// [`Error::Unsettled`] for the first that cannot be settled now; it stays in the journal.
pub async fn recover(session: &Session, state: &State) -> Result<Vec<Recovered>, Error> {
    let mut settled = Vec::new();
    for pending in state.pending(Some(&session.vm))? {
        if let Some(outcome) = settle_other(Some(session), &pending, state).await? {
            settled.push(outcome);
            continue;
        }
        let plan = create_plan(&pending)?;
        let unsettled = |why: String| unsettled(&pending, why);
        let machine = session.observe().await?;
        // Before that no freeze was sent either.
        if plan.freeze.is_some()
            && switch_was_sent(&pending)
            && let Thaw::NoAgent { why } = frozen::thaw(session, &machine.chardevs, Some(session.timeout))
                .await
                .map_err(|why| unsettled(format!("the guest may be frozen, and cannot be thawed: {why}")))?
        {
            frozen::remember(session, state)?;
            settled.push(Recovered::MayBeFrozen { vm: session.vm.clone(), why });
        }
        let on = disks_are_on(&plan, &machine).map_err(unsettled)?;
        let memory = match &plan.memory {
            Some(memory) => Some(memory::settle(&session.qmp, &machine, memory, on == On::Overlays).await),
            None => None,
        };
        let memory = memory.transpose().map_err(|fault| unsettled(fault.to_string()))?;
        let outcome = match on {
            On::Overlays => finish_running(&pending, &plan, state, &machine, memory).await,
            On::Bases => undo_running(&pending, &plan, session, state, &machine).await,
            On::Nothing => settle_detached(&pending, &plan, session, state, &machine).await,
        };
        settled.push(outcome.map_err(|fault| unsettled(fault.to_string()))?);
    }
    Ok(settled)
}

/// Settles every interrupted operation on a VM that does not run, by what its files say.
///
/// The caller holds the VM's lock.
///
/// # Errors
/// As [`recover`]; also if a process has one of the overlays open.
pub async fn recover_stopped(vm: &Name, state: &State) -> Result<Vec<Recovered>, Error> {
    let mut settled = Vec::new();
    for pending in state.pending(Some(vm))? {
        if let Some(outcome) = settle_other(None, &pending, state).await? {
            settled.push(outcome);
            continue;
        }
        let plan = create_plan(&pending)?;
        let outcome = settle_stopped(&pending, &plan, state).await;
        settled.push(outcome.map_err(|fault| unsettled(&pending, fault.to_string()))?);
    }
    Ok(settled)
}

/// Settles an operation that is no `create`; none if it is one.
async fn settle_other(
    session: Option<&Session>,
    pending: &PendingOperation,
    state: &State,
) -> Result<Option<Recovered>, Error> {
    let settled = match pending.kind.as_str() {
        merge::KIND => merge::settle_pending(session, pending, state).await.map(Recovered::Merged),
        revert::KIND => revert::settle_pending(session, pending, state).await,
        internal::CREATE | internal::REVERT => internal::settle_pending(session, pending, state).await,
        aside::KIND => aside::settle_pending(session, pending, state).await,
        frozen::KIND => frozen::settle_pending(session, pending, state).await,
        _ => return Ok(None),
    };
    settled.map(Some).map_err(|fault| unsettled(pending, fault.to_string()))
}

fn create_plan(pending: &PendingOperation) -> Result<CreatePlan, Error> {
    match pending.kind.as_str() {
        "create" => Ok(pending.plan()?),
        _ => Err(unsettled(
            pending,
            "this snapctl does not know this kind of operation; a newer one made it".into(),
        )),
    }
}

fn unsettled(pending: &PendingOperation, why: String) -> Error {
    Error::Unsettled { vm: pending.vm.clone(), operation: pending.id, kind: pending.kind.clone(), why }
}

/// What the plan's disks run on. One that was detached since says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum On {
    Overlays,
    Bases,
    /// None of them is in the VM any more.
    Nothing,
}

fn disks_are_on(plan: &CreatePlan, machine: &Machine) -> Result<On, String> {
    let on_overlay = |disk: &&DiskPlan| is_switched(disk, &machine.graph) || machine.runs_on(&disk.overlay);
    let (switched, others): (Vec<_>, Vec<_>) = plan.disks.iter().partition(on_overlay);
    let unswitched = others.iter().filter(|disk| machine.runs_on(&disk.base)).count();
    match (switched.len(), unswitched) {
        (0, 0) => Ok(On::Nothing),
        (0, _) => Ok(On::Bases),
        (_, 0) => Ok(On::Overlays),
        (switched, _) => {
            Err(format!("{switched} disks run on their overlays and {unswitched} on their bases"))
        }
    }
}

/// Whether this QEMU made the point: it opens the overlay without a backing file, and only the transaction
/// gives it one. What stands above the overlay, and what its path is now, does not matter.
fn is_switched(disk: &DiskPlan, graph: &BlockGraph) -> bool {
    let is_overlay = |id: u64| {
        let mut nodes = graph.nodes.iter();
        nodes.any(|node| node.id == id && node.kind == "block-driver" && node.name == disk.overlay_node)
    };
    graph.edges.iter().any(|edge| edge.name == "backing" && is_overlay(edge.parent))
}

async fn finish_running(
    pending: &PendingOperation,
    plan: &CreatePlan,
    state: &State,
    machine: &Machine,
    memory: Option<Memory>,
) -> Result<Recovered, StepError> {
    let operation = state.resume(pending.id)?;
    let same_qemu = plan.disks.iter().any(|disk| is_switched(disk, &machine.graph));
    let made_at = made_at(pending, plan, same_qemu);
    let mut warnings = Vec::new();
    let memory = memory::keep_or_tell(plan, memory.as_ref(), &mut warnings).await?;
    let snapshot =
        enter_verified(plan, operation, made_at, &point_of_unknown_freeze(), memory, &mut warnings)?;
    tell(&warnings);
    Ok(Recovered::Finished { snapshot: Box::new(snapshot) })
}

/// Undoes, unless somebody started the VM on its old layers since: what the guest wrote after the point
/// stays.
async fn undo_running(
    pending: &PendingOperation,
    plan: &CreatePlan,
    session: &Session,
    state: &State,
    machine: &Machine,
) -> Result<Recovered, StepError> {
    close(session, plan).await?;
    for disk in &plan.disks {
        require_free(&disk.overlay, machine.pid)?;
    }
    if point_was_made(pending, plan)? {
        return Err(StepError::OldLayers { overlays: overlay_paths(plan) });
    }
    undo_files(pending, plan, state)
}

/// Settles for disks that this VM has no more, as if it did not run.
async fn settle_detached(
    pending: &PendingOperation,
    plan: &CreatePlan,
    session: &Session,
    state: &State,
    machine: &Machine,
) -> Result<Recovered, StepError> {
    // Then there is no point, and nothing depends on who uses the bases.
    if !switch_was_sent(pending) {
        return undo_running(pending, plan, session, state, machine).await;
    }
    close(session, plan).await?;
    settle_stopped(pending, plan, state).await
}

async fn close(session: &Session, plan: &CreatePlan) -> Result<(), StepError> {
    let left = overlays::close(&session.qmp, &plan.disks).await;
    if left.is_empty() { Ok(()) } else { Err(StepError::LeftBehind(left)) }
}

async fn settle_stopped(
    pending: &PendingOperation,
    plan: &CreatePlan,
    state: &State,
) -> Result<Recovered, StepError> {
    for disk in &plan.disks {
        require_free(&disk.overlay, None)?;
        require_free(&disk.base, None)?;
    }
    if !point_was_made(pending, plan)? {
        return undo_files(pending, plan, state);
    }
    let operation = state.resume(pending.id)?;
    let mut warnings = Vec::new();
    let made_at = made_at(pending, plan, false);
    let saved = pending.step == memory::SAVED;
    let memory = plan.memory.as_ref().map(|memory| memory::settle_stopped(memory, saved));
    let memory = memory::keep_or_tell(plan, memory.as_ref(), &mut warnings).await?;
    let snapshot = enter(plan, operation, made_at, &point_of_unknown_freeze(), memory, &mut warnings)?;
    tell(&warnings);
    Ok(Recovered::Finished { snapshot: Box::new(snapshot) })
}

/// Requires that no process has `path` open. `asked` is a QEMU that said so itself, in case that it cannot
/// be looked into.
pub(crate) fn require_free(path: &Path, asked: Option<u32>) -> Result<(), StepError> {
    match user_of(path)? {
        Users::Nobody => Ok(()),
        Users::Process(pid) => Err(StepError::InUse { path: path.to_owned(), pid }),
        Users::Unknown(pids) => match pids.into_iter().find(|pid| Some(*pid) != asked) {
            Some(pid) => Err(StepError::MaybeInUse { path: path.to_owned(), pid }),
            None => Ok(()),
        },
    }
}

/// When the point was made, as well as it can be told: the guest wrote to the bases until then.
///
/// In the QEMU that made the point, nothing wrote to them since. Another one may have run on them after the
/// point, and that has to show: then a base counts no later than the guest wrote to the overlays.
fn made_at(pending: &PendingOperation, plan: &CreatePlan, same_qemu: bool) -> Timestamp {
    let bases = newest(plan.disks.iter().map(|disk| &disk.base));
    let overlays = newest(plan.disks.iter().map(|disk| &disk.overlay));
    let written = if same_qemu { bases } else { bases.min(overlays) };
    written.map_or(pending.started, |written| written.max(pending.started))
}

fn newest<'a>(paths: impl Iterator<Item = &'a PathBuf>) -> Option<Timestamp> {
    let written = |path: &PathBuf| Timestamp::try_from(std::fs::metadata(path).ok()?.modified().ok()?).ok();
    paths.filter_map(written).max()
}

/// Recovery stands before another command, whose own result says nothing of these.
pub(crate) fn tell(warnings: &[Warning]) {
    for warning in warnings {
        tracing::warn!("{warning}");
    }
}

fn undo_files(pending: &PendingOperation, plan: &CreatePlan, state: &State) -> Result<Recovered, StepError> {
    let mut left = overlays::remove_noted_or_empty(&plan.disks, &noted(pending)?);
    left.extend(plan.memory.iter().flat_map(memory::remove_files));
    left.extend(platform::remove(&plan.platform));
    undone(pending, plan, state, left)
}

fn undone(
    pending: &PendingOperation,
    plan: &CreatePlan,
    state: &State,
    left: Vec<String>,
) -> Result<Recovered, StepError> {
    if !left.is_empty() {
        return Err(StepError::LeftBehind(left));
    }
    state.resume(pending.id)?.undone()?;
    Ok(Recovered::Undone { name: plan.name.clone() })
}

/// Whether the point was made, by what the journal and the overlays say: for a VM that is not the QEMU any
/// more in which it was made.
fn point_was_made(pending: &PendingOperation, plan: &CreatePlan) -> Result<bool, StepError> {
    Ok(switch_was_seen(pending) || (switch_was_sent(pending) && hold_data(plan)?))
}

fn overlay_paths(plan: &CreatePlan) -> String {
    plan.disks.iter().map(|disk| disk.overlay.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Whether the transaction may have been sent: "prepared" is durable before that.
fn switch_was_sent(pending: &PendingOperation) -> bool {
    !matches!(pending.step.as_str(), "begun" | "create.files")
}

/// Whether every disk was seen on its overlay: "verified" is durable before anything is said of it.
fn switch_was_seen(pending: &PendingOperation) -> bool {
    ["create.verified", memory::SAVED].contains(&pending.step.as_str())
}

/// Whether the guest wrote anything since the point: that is in the overlays. If there is nothing in any of
/// them, dropping them loses nothing, whether the point was made or not.
fn hold_data(plan: &CreatePlan) -> Result<bool, StepError> {
    for disk in &plan.disks {
        if holds_data(&disk.overlay)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn holds_data(overlay: &Path) -> Result<bool, StepError> {
    let file = match std::fs::File::open(overlay) {
        Ok(file) => file,
        Err(fault) if fault.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(fault) => return Err(host::Error::io("open", overlay)(fault).into()),
    };
    let size = file.metadata().map_err(host::Error::io("look at", overlay))?.len();
    if size == 0 {
        return Ok(false);
    }
    qcow2::is_pristine(&file, overlay).map(|pristine| !pristine).map_err(StepError::Header)
}

fn noted(pending: &PendingOperation) -> Result<Vec<Inode>, StepError> {
    Ok(pending.notes::<Vec<Inode>>()?.unwrap_or_default())
}

/// Nobody saw whether the freeze held until the point; so it is recorded as what it is at least.
fn point_of_unknown_freeze() -> Point {
    Point::crash()
}
