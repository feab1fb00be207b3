//! Settling what was interrupted.
//!
//! The journal says what was to be done; QEMU and the files say what is. Every disk on its overlay: the
//! point is made, so the rest is done. No disk on it: everything is undone. Nothing between these can be,
//! since all disks change in one transaction.

use agent_client::ChardevInfo;
use model::{Consistency, Name, SnapshotRecord};
use serde::Serialize;
use storage::{Inode, qcow2};
use vm::{Machine, PendingOperation, Session, State, open_agent};

use crate::create::{Warning, enter, settle};
use crate::error::{Error, StepError};
use crate::overlays;
use crate::plan::CreatePlan;
use crate::point::Point;

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
}

/// Settles every interrupted operation on the VM behind `session`, oldest first.
///
/// # Errors
/// [`Error::Unsettled`] for the first that cannot be settled now; it stays in the journal.
pub async fn recover(session: &Session, state: &State) -> Result<Vec<Recovered>, Error> {
    let mut settled = Vec::new();
    for pending in state.pending(Some(&session.vm))? {
        let plan = create_plan(&pending)?;
        let unsettled = |why: String| unsettled(&pending, why);
        let machine = session.observe().await?;
        if plan.freeze.is_some() {
            thaw(session, &machine.chardevs).await.map_err(unsettled)?;
        }
        let outcome = match disks_on_overlays(&plan, &machine).map_err(unsettled)? {
            true => finish_running(&pending, &plan, state, &machine),
            // Somebody started the VM on its old layers since. What the guest wrote after the point stays.
            false => match point_was_made(&pending, &plan).map_err(|fault| unsettled(fault.to_string()))? {
                true => Err(StepError::OldLayers { overlays: overlay_paths(&plan) }),
                false => undo_running(&pending, &plan, session, state).await,
            },
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
pub fn recover_stopped(vm: &Name, state: &State) -> Result<Vec<Recovered>, Error> {
    let mut settled = Vec::new();
    for pending in state.pending(Some(vm))? {
        let plan = create_plan(&pending)?;
        let outcome = settle_stopped(&pending, &plan, state);
        settled.push(outcome.map_err(|fault| unsettled(&pending, fault.to_string()))?);
    }
    Ok(settled)
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

/// Thaws, whatever the agent believes: a guard that died with its parent leaves a frozen guest behind.
///
/// An agent that does not run holds no freeze; one that runs and does not answer may.
async fn thaw(session: &Session, chardevs: &[ChardevInfo]) -> Result<(), String> {
    let agent =
        open_agent(&session.vm, &session.definition, chardevs, Some(session.timeout), session.timeout).await;
    match agent {
        Ok(agent) => {
            agent.thaw().await.map(drop).map_err(|fault| format!("the guest cannot be thawed: {fault}"))
        }
        Err(vm::Error::NoAgent { source: None, .. }) => Ok(()),
        Err(fault) => Err(format!("the guest may be frozen, and cannot be thawed: {fault}")),
    }
}

/// Whether the plan's disks run on their overlays: all of them, or none. A disk that was detached since
/// says nothing.
fn disks_on_overlays(plan: &CreatePlan, machine: &Machine) -> Result<bool, String> {
    let active: Vec<_> =
        machine.disks.iter().filter_map(|disk| disk.layer()).map(|layer| &layer.path).collect();
    let switched = plan.disks.iter().filter(|disk| active.contains(&&disk.overlay)).count();
    let unswitched = plan.disks.iter().filter(|disk| active.contains(&&disk.base)).count();
    match (switched, unswitched) {
        (0, _) => Ok(false),
        (_, 0) => Ok(true),
        _ => Err(format!("{switched} disks run on their overlays and {unswitched} on their bases")),
    }
}

fn finish_running(
    pending: &PendingOperation,
    plan: &CreatePlan,
    state: &State,
    machine: &Machine,
) -> Result<Recovered, StepError> {
    let operation = state.resume(pending.id)?;
    let snapshot =
        settle(plan, machine, operation, pending.started, &point_of_unknown_freeze(), &mut Vec::new())?;
    Ok(Recovered::Finished { snapshot: Box::new(snapshot) })
}

async fn undo_running(
    pending: &PendingOperation,
    plan: &CreatePlan,
    session: &Session,
    state: &State,
) -> Result<Recovered, StepError> {
    let mut left = overlays::close(&session.qmp, plan).await;
    left.extend(overlays::remove_noted_or_empty(plan, &noted(pending)?));
    undone(pending, plan, state, left)
}

fn settle_stopped(
    pending: &PendingOperation,
    plan: &CreatePlan,
    state: &State,
) -> Result<Recovered, StepError> {
    for disk in &plan.disks {
        for path in [&disk.overlay, &disk.base] {
            if let Some(pid) = host::open_files::user_of(path)? {
                return Err(StepError::InUse { path: path.clone(), pid });
            }
        }
    }
    if !point_was_made(pending, plan)? {
        return undone(pending, plan, state, overlays::remove_noted_or_empty(plan, &noted(pending)?));
    }
    let operation = state.resume(pending.id)?;
    let warnings: &mut Vec<Warning> = &mut Vec::new();
    let snapshot = enter(plan, operation, pending.started, &point_of_unknown_freeze(), warnings)?;
    Ok(Recovered::Finished { snapshot: Box::new(snapshot) })
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
    pending.step == "create.verified"
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

fn holds_data(overlay: &std::path::Path) -> Result<bool, StepError> {
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
    Point { consistency: Consistency::Crash, freeze: None, frozen_still: None }
}
