//! Going back to a snapshot: each disk goes on in a fresh overlay on the layer that holds the snapshot.
//!
//! Nothing that a snapshot holds is changed, so one can go back and forth. What the guest wrote since is kept as a
//! snapshot of its own, on a branch, unless it is to be thrown away.
//!
//! On a running VM the guest is held, every disk is switched without copying, and the guest is reset; it never runs on
//! disks of two times. Once one disk is switched, only going on is possible, and the catalogue has the new layers
//! before the guest runs again.

mod plan;
mod run;

use jiff::Timestamp;
use model::{ByteSize, History, Name, OperationId, SnapshotId};
use storage::chain::Chain;
use storage::{Inode, allocated};
use tokio::sync::Mutex;
use vm::disks::NodeOptions;
use vm::{FEATURES, Feature, Machine, PendingOperation, Session, State, require_features};

use crate::aside;
use crate::create::{Interrupt, Warning, fate, random_bits, step_error};
use crate::encrypted;
use crate::error::{Error, Fate, StepError};
use crate::lineage::{name_by_history, names_of};
use crate::merge::holds_internal;
use crate::pause::Pauser;
use crate::plan::{Refusal, refuse_job, refuse_migration, refuse_stale};
use crate::platform;
use crate::recover::{Recovered, require_free};
use crate::target::{Target, Tools, observe};
use crate::view::{find_snapshot, policy};
use plan::{Current, Given};
use run::{PUT_BACK, Run};

pub(crate) use plan::branch_name;
pub use plan::{RevertDisk, RevertPlan, RevertRequest};

/// The kind of these operations in the journal.
pub(crate) const KIND: &str = "revert";
/// What failed, for people.
const STEP: &str = "reverting";

/// What reverting a running VM needs of QEMU, beside what a snapshot does.
///
/// Source: the "Since" lines of qapi/block-core.json and run-state.json.
const SWITCH_FEATURES: [Feature; 2] = [
    Feature { command: "blockdev-mirror", argument: Some("replaces"), since: "2.6" },
    Feature { command: "set-action", argument: Some("reboot"), since: "6.0" },
];

/// A VM that went back.
#[derive(Debug)]
pub struct Reverted {
    /// What was done.
    pub plan: RevertPlan,
    /// What a person should read.
    pub warnings: Vec<Warning>,
}

/// Decides what [`revert`] would do, and touches nothing.
///
/// # Errors
/// As [`revert`], before its first step.
pub async fn plan_revert(
    target: &Target<'_>,
    state: &State,
    request: &RevertRequest,
) -> Result<RevertPlan, Error> {
    decide(target, state, request).await
}

/// Lets the disks of a VM go on from a snapshot.
///
/// Operations that were interrupted earlier have to be settled before, see [`crate::recover`].
///
/// # Errors
/// [`Error::NoSuchSnapshot`], [`Error::Ambiguous`], [`Error::Refused`], [`Error::Vm`] before the first step; then
/// [`Error::Step`] or [`Error::Interrupted`], which say what stands.
pub async fn revert(
    target: &Target<'_>,
    state: &State,
    request: &RevertRequest,
    tools: &Tools,
    interrupt: &Interrupt,
) -> Result<Reverted, Error> {
    let plan = decide(target, state, request).await?;
    let operation = state.begin(plan.operation, &plan.vm, KIND, &plan)?;
    let session = target.session();
    let run = Run { plan: &plan, session, state, is_put_back: false };
    let (mut made, turn) = (Vec::new(), Mutex::new(()));
    let prepared = run.prepare(target, tools, &operation, &mut made, interrupt).await;
    let pause = match (prepared, session) {
        (Ok(()), Some(session)) => Pauser { session, guard: &tools.guard, turn: &turn }.begin().await,
        (Ok(()), None) => Ok(None),
        (Err(fault), _) => Err(fault),
    };
    let held =
        pause.and_then(|pause| host::fault::point("revert.paused").map_err(Into::into).map(|()| pause));
    let pause = match held {
        Ok(pause) => pause,
        Err(source) => {
            let fate = fate(operation, run.undo(&made).await);
            return Err(step_error(STEP, source, fate));
        }
    };
    let mut warnings = Vec::new();
    let advanced = run.advance(operation, pause, &mut warnings).await;
    advanced.map_err(|source| {
        let stands = format!("'snapctl recover {}' looks, and finishes or undoes it", plan.vm);
        step_error(STEP, source, Fate::Interrupted(stands))
    })?;
    Ok(Reverted { plan, warnings })
}

async fn decide(target: &Target<'_>, state: &State, request: &RevertRequest) -> Result<RevertPlan, Error> {
    let vm = target.vm();
    let known = state.history(None)?;
    let own = known.of(vm);
    let snapshot = find_snapshot(vm, &own, &request.snapshot)?;
    if snapshot.internal.is_some() {
        let (vm, snapshot) = (vm.clone(), snapshot.name.clone());
        return Err(Refusal::NothingToRevert { vm, snapshot }.into());
    }
    let (current, machine) = match target {
        Target::Running(session) => {
            require_features(vm, &session.qmp, &session.paths, &FEATURES).await?;
            require_features(vm, &session.qmp, &session.paths, &SWITCH_FEATURES).await?;
            let mut machine = session.observe().await?;
            name_by_history(&mut machine.disks, &known);
            (running(vm, &machine, &known)?, Some(machine))
        }
        Target::Stopped { .. } => (stopped(&own)?, None),
    };
    let given = Given {
        operation: OperationId::from_bits(random_bits()),
        branch: SnapshotId::from_bits(random_bits()),
        now: Timestamp::now(),
        runs: machine.as_ref().is_some_and(|machine| machine.status.running),
        ends_on_reset: machine.as_ref().and_then(|machine| machine.pid).is_some_and(ends_on_reset),
    };
    let mut plan = RevertPlan::new(vm, request, snapshot, &current, &own, given)?;
    // One that is gone by now cannot be kept.
    plan.platform_now.retain(|file| file.live.exists());
    if machine.is_none() {
        platform::require_unused(&plan.platform)
            .map_err(|source| step_error(STEP, source, Fate::Untouched))?;
    }
    let tag = plan.operation.tag();
    for disk in &mut plan.disks {
        if let Some(method) = disk.renewed {
            let (base, overlay) = (&disk.new.base, &disk.new.overlay);
            let path = aside::renewed_path(base, overlay, disk.new.format, method, &tag);
            disk.new.overlay = path.map_err(|source| step_error(STEP, source, Fate::Untouched))?;
        }
        let chain = Chain::open(&disk.new.base, disk.new.format, &policy(&known)).map_err(Refusal::Chain)?;
        if let Some(secret) = &disk.new.options.key_secret {
            disk.new.backing = encrypted::open_options(chain.layers(), secret);
        } else {
            encrypted::refuse_offline(vm, chain.layers().map(|layer| (layer.path.as_path(), layer.format)))?;
        }
        let old = Chain::open(&disk.old, disk.old_format, &policy(&known)).map_err(Refusal::Chain)?;
        if plan.branch.is_none() && holds_internal(old.active()) {
            return Err(Refusal::HoldsInternal { path: disk.old.clone() }.into());
        }
        if machine.is_some() && disk.old_size != disk.new.virtual_size {
            return Err(resized(vm, disk).into());
        }
        if machine.is_none() {
            require_free(&disk.old, None).map_err(|source| step_error(STEP, source, Fate::Untouched))?;
        }
    }
    Ok(plan)
}

fn resized(vm: &Name, disk: &RevertDisk) -> Refusal {
    Refusal::Resized {
        vm: vm.clone(),
        disk: disk.new.disk.clone(),
        now: disk.old_size,
        then: disk.new.virtual_size,
    }
}

fn running(vm: &Name, machine: &Machine, known: &History) -> Result<Vec<Current>, Refusal> {
    refuse_migration(vm, machine)?;
    let mut current = Vec::new();
    for disk in &machine.disks {
        let Some(layer) = disk.layer() else { continue };
        refuse_job(vm, disk, &layer.nodes, machine)?;
        refuse_stale(vm, disk, &layer.path, known)?;
        current.push(Current {
            disk: disk.name.clone(),
            names: disk.names.clone(),
            root: layer.nodes.first().unwrap_or(&layer.node).clone(),
            node: layer.node.clone(),
            path: layer.path.clone(),
            format: layer.format,
            virtual_size: layer.virtual_size,
            allocated: std::fs::metadata(&layer.path).map_or(ByteSize(0), |found| allocated(&found)),
            options: layer.options.clone(),
        });
    }
    Ok(current)
}

fn stopped(own: &History) -> Result<Vec<Current>, Refusal> {
    let policy = policy(own);
    let mut current = Vec::new();
    for head in &own.heads {
        let chain = Chain::open(&head.path, head.format, &policy)?;
        current.push(Current {
            disk: head.disk.clone(),
            names: names_of(own, &head.path),
            root: String::new(),
            node: String::new(),
            path: head.path.clone(),
            format: head.format,
            virtual_size: chain.active().virtual_size,
            allocated: chain.active().allocated,
            options: NodeOptions { detect_zeroes: "off".into(), ..NodeOptions::default() },
        });
    }
    Ok(current)
}

/// Whether QEMU was told to end where its guest resets. Its command line tells; no QMP command does.
///
/// Source: qemu(1), `-no-reboot` and `-action reboot=shutdown`.
fn ends_on_reset(pid: u32) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    let action = |pair: &[&[u8]]| {
        pair[0].ends_with(b"-action") && String::from_utf8_lossy(pair[1]).contains("reboot=shutdown")
    };
    words.iter().any(|word| matches!(*word, b"-no-reboot" | b"--no-reboot")) || words.windows(2).any(action)
}

/// Finishes a revert of which a disk was switched, and undoes another.
///
/// # Errors
/// The journal knows of it still, and this can be tried again.
pub(crate) async fn settle_pending(
    session: Option<&Session>,
    pending: &PendingOperation,
    state: &State,
) -> Result<Recovered, StepError> {
    let plan: RevertPlan = pending.plan()?;
    let is_put_back = pending.step == PUT_BACK;
    let run = Run { plan: &plan, session, state, is_put_back };
    let operation = state.resume(pending.id)?;
    let history = state.history(Some(&plan.vm))?;
    let is_entered = plan.disks.iter().any(|disk| history.head(&disk.new.overlay).is_some());
    // Where the VM does not run, a guest has run on its new disks only if they are in the catalogue.
    let machine = observe(session).await?;
    let is_switched =
        machine.is_some_and(|machine| plan.disks.iter().any(|disk| machine.runs_on(&disk.new.overlay)));
    if is_entered || is_switched {
        let mut warnings = Vec::new();
        run.advance(operation, None, &mut warnings).await?;
        crate::recover::tell(&warnings);
        return Ok(Recovered::Reverted { vm: plan.vm, snapshot: plan.snapshot.name, done: true });
    }
    if session.is_none() {
        for disk in &plan.disks {
            require_free(&disk.new.overlay, None)?;
        }
    }
    // Before the files were noted there was nothing in them.
    let made = if pending.step == "begun" { None } else { pending.notes::<Vec<Inode>>()? };
    let left = run.undo(&made.unwrap_or_default()).await;
    if !left.is_empty() {
        return Err(StepError::LeftBehind(left));
    }
    operation.undone()?;
    Ok(Recovered::Reverted { vm: plan.vm, snapshot: plan.snapshot.name, done: false })
}
