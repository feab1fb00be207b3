//! Deleting snapshots and flattening disks: layers that nobody needs any more are merged away.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`forest`] | what there is to merge, a pure function of layers and what needs them |
//! | [`survey`] | the layers as they are: headers, QEMU, the catalogue, clones of others |
//! | [`plan`] | the plan that `--dry-run` prints |
//! | [`ledger`] | journal and catalogue, changed together |
//! | [`run`] | carries a plan out |
//! | [`job`] | one block job: rooms, pace, pivot |
//! | [`settle`] | looks what became of a merge, and ends it; recovery does so too |
//!
//! A deletion is done for the user as soon as it is in the catalogue. What is merged after that can stop at any
//! point and go on later: a layer that is not merged yet is read through, as before.

mod forest;
mod job;
mod ledger;
mod plan;
mod run;
mod settle;
mod survey;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_client::JobInfo;
use futures_util::future::join_all;
use host::files;
use jiff::Timestamp;
use model::{ByteSize, History, ImageFormat, Name, OperationId};
use serde::Serialize;
use storage::space::{self, SpaceError};
use tokio::sync::Mutex;
use vm::disks::select;
use vm::{Feature, Machine, PendingOperation, Session, State, require_features};

use crate::aside;
use crate::create::{Interrupt, random_bits, step_error};
use crate::encrypted;
use crate::error::{Error, Fate, StepError};
use crate::internal;
use crate::jobs;
use crate::plan::{Refusal, refuse_busy_bitmap, refuse_job, refuse_migration};
use crate::recover::require_free;
use crate::target::{Target, Tools};
use crate::view::find_snapshot;
use job::Shared;
use ledger::{InFlight, Ledger};
use plan::mark_deleted;
use run::{Run, room};
use settle::{Became, Settler};
use survey::{Survey, survey};
pub(crate) use survey::{holds_internal, refuse_other_chain};

pub use forest::{Merge, Staying};
pub use plan::{DiskMerges, Going, MergePlan};

/// The kind of these operations in the journal.
pub(crate) const KIND: &str = "merge";
/// How long the guest may be held at the end of a merge of its active layer, unless the user says otherwise.
pub const DEFAULT_MAX_PAUSE: Duration = Duration::from_secs(5);
/// How long a job waits for room, unless the user says otherwise.
pub const DEFAULT_WAIT_FOR_ROOM: Duration = Duration::from_secs(60);

/// What merging needs of QEMU.
///
/// Source: the "Since" lines of qapi/block-core.json, job.json.
const FEATURES: [Feature; 8] = [
    Feature { command: "block-commit", argument: Some("base-node"), since: "3.1" },
    Feature { command: "block-commit", argument: Some("auto-finalize"), since: "3.1" },
    Feature { command: "block-commit", argument: Some("on-error"), since: "5.0" },
    Feature { command: "block-stream", argument: Some("auto-finalize"), since: "3.1" },
    Feature { command: "block-stream", argument: Some("base-node"), since: "2.8" },
    Feature { command: "job-finalize", argument: None, since: "3.0" },
    Feature { command: "blockdev-del", argument: None, since: "2.9" },
    Feature { command: "x-debug-query-block-graph", argument: None, since: "4.0" },
];

/// What is wanted.
#[derive(Clone, Debug)]
pub enum MergeRequest {
    /// Delete snapshots, by name, id, unique prefix, or `latest`.
    Delete(Vec<String>),
    /// Make the active layers of these disks independent; of all if empty.
    Flatten(Vec<String>),
    /// Merge what earlier deletions left.
    Collect,
}

/// How far a merge may go.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most bytes that each disk's job copies in a second; none for no limit.
    pub bandwidth: Option<ByteSize>,
    /// How long the guest may be held where its active layer is merged away.
    pub max_pause: Duration,
    /// How long a job waits for room.
    pub wait_for_room: Duration,
}

impl Limits {
    /// As QEMU takes it: 0 means no limit.
    fn speed(&self) -> u64 {
        self.bandwidth.map_or(0, |bandwidth| bandwidth.0)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { bandwidth: None, max_pause: DEFAULT_MAX_PAUSE, wait_for_room: DEFAULT_WAIT_FOR_ROOM }
    }
}

/// How far the jobs are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "progress", rename_all = "kebab-case")]
pub enum Progress {
    /// One disk's job.
    Copied {
        /// The disk's place in the plan.
        disk: usize,
        /// How far it is, in bytes of the disk, those included that need no copy.
        done: ByteSize,
        /// Where it ends.
        total: ByteSize,
    },
    /// A disk's job waits for room.
    NoRoom {
        /// The disk's place in the plan.
        disk: usize,
        /// Where there is none.
        dir: PathBuf,
    },
}

impl Progress {
    fn of(disk: usize, job: &JobInfo) -> Self {
        let bytes = |progress: i64| ByteSize(u64::try_from(progress).unwrap_or(0));
        Self::Copied { disk, done: bytes(job.current_progress), total: bytes(job.total_progress) }
    }
}

/// Who is told what happens.
pub trait Watch {
    /// This will be done, now.
    fn planned(&self, plan: &MergePlan);
    /// A job went on.
    fn progress(&self, progress: &Progress);
}

/// Decides what [`merge`] would do, and touches nothing.
///
/// # Errors
/// As [`merge`], before its first step.
pub async fn plan_merge(
    target: &Target<'_>,
    state: &State,
    request: &MergeRequest,
) -> Result<MergePlan, Error> {
    decide(target, state, request).await.map(|decided| decided.plan)
}

/// Deletes snapshots, flattens disks, or merges what was left.
///
/// Operations that were interrupted earlier have to be settled before, see [`crate::recover`].
///
/// # Errors
/// [`Error::NoSuchSnapshot`], [`Error::Ambiguous`], [`Error::Refused`], [`Error::Vm`] before the first step. After
/// it, [`Error::Step`] or [`Error::Interrupted`]: the snapshots are deleted, and what is not merged yet can be
/// merged later.
pub async fn merge(
    target: &Target<'_>,
    state: &State,
    request: &MergeRequest,
    limits: Limits,
    tools: &Tools,
    watch: &dyn Watch,
    interrupt: &Interrupt,
) -> Result<MergePlan, Error> {
    let Decided { plan, history } = decide(target, state, request).await?;
    if plan.snapshots.is_empty() && plan.disks.is_empty() {
        return Ok(plan);
    }
    watch.planned(&plan);
    let operation = state.begin(plan.operation, &plan.vm, KIND, &plan)?;
    let ledger = Ledger::new(operation, &plan.vm, history, Vec::new());
    ledger.open()?;
    let shared = Shared { limits, watch, interrupt, turn: Mutex::new(()) };
    let ran = run_all(target, tools, &plan, &ledger, shared).await;
    let closed = ledger.close();
    ran.map_err(|source| left_to_merge(&plan, source))?;
    closed?;
    Ok(plan)
}

async fn run_all(
    target: &Target<'_>,
    tools: &Tools,
    plan: &MergePlan,
    ledger: &Ledger<'_>,
    shared: Shared<'_>,
) -> Result<(), StepError> {
    host::fault::point("merge.deleted")?;
    remove_beside(plan, target.session(), ledger).await?;
    let settler = Settler { session: target.session(), ledger };
    let run = Run { target, tools, operation: plan.operation, settler, shared: &shared };
    let disks = plan.disks.iter().enumerate().map(|(index, disk)| run.disk(index, disk));
    // All of them come to their end: none is dropped in the middle of a change.
    join_all(disks).await.into_iter().collect()
}

/// The snapshots are deleted: nothing leads to these any more.
async fn remove_beside(
    plan: &MergePlan,
    session: Option<&Session>,
    ledger: &Ledger<'_>,
) -> Result<(), StepError> {
    for path in &plan.beside {
        files::remove_durably(path)?;
    }
    for internal in &plan.internal {
        internal::remove(session, internal, plan.operation).await?;
    }
    // One inside the images has no layers that would let go of its record.
    match plan.internal.is_empty() {
        true => Ok(()),
        false => Ok(ledger.drop_empty()?),
    }
}

fn left_to_merge(plan: &MergePlan, source: StepError) -> Error {
    let deleted = match plan.snapshots.is_empty() {
        true => "",
        false => "the snapshots are deleted, and ",
    };
    let stands = format!(
        "{deleted}every point that stays is whole; layers are left to be merged: 'snapctl recover {}' goes on",
        plan.vm
    );
    step_error("merging layers", source, Fate::Interrupted(stands))
}

struct Decided {
    plan: MergePlan,
    /// That of the VM alone, with the snapshots deleted.
    history: History,
}

async fn decide(target: &Target<'_>, state: &State, request: &MergeRequest) -> Result<Decided, Error> {
    let vm = target.vm();
    let machine = match target {
        Target::Running(session) => {
            require_features(vm, &session.qmp, &session.paths, &FEATURES).await?;
            Some(session.observe().await?)
        }
        Target::Stopped { .. } => None,
    };
    let mut known = state.history(None)?;
    let going = going(vm, request, &known.of(vm))?;
    mark_deleted(&mut known, &going, Timestamp::now());
    let history = known.of(vm);
    let found = survey(vm, machine.as_ref(), &known)?;
    let flatten = flattened(vm, request, &found, machine.as_ref())?;
    let is_pinned = |path: &&PathBuf| {
        let pinned = found.forest.layers.get(*path).is_some_and(|layer| layer.pinned);
        pinned && found.forest.flatten(path).is_some()
    };
    if let Some(path) = flatten.iter().find(is_pinned) {
        return Err(Refusal::HoldsInternal { path: path.clone() }.into());
    }
    let operation = OperationId::from_bits(random_bits());
    let plan = MergePlan::new(operation, vm, going, &flatten, &found, &history);
    if let Some(machine) = &machine {
        refuse_busy(&plan, machine)?;
    }
    require_room(&plan)?;
    refuse_encrypted(&plan, machine.as_ref())?;
    require_free_files(&plan, machine.as_ref())
        .map_err(|source| step_error("looking whether the layers are free", source, Fate::Untouched))?;
    Ok(Decided { plan, history })
}

fn going(vm: &Name, request: &MergeRequest, history: &History) -> Result<Vec<Going>, Error> {
    let MergeRequest::Delete(wanted) = request else { return Ok(Vec::new()) };
    let mut going: Vec<Going> = Vec::new();
    for wanted in wanted {
        let found = find_snapshot(vm, history, wanted)?;
        if found.protected {
            let (vm, snapshot) = (vm.clone(), found.name.clone());
            return Err(Refusal::Protected { vm, snapshot }.into());
        }
        if let Some(internal) = &found.internal {
            internal::refuse_frozen(history, &found.name, internal)?;
        }
        if !going.iter().any(|other| other.id == found.id) {
            going.push(Going { id: found.id, name: found.name.clone() });
        }
    }
    Ok(going)
}

/// The active layers that are to stand alone.
fn flattened(
    vm: &Name,
    request: &MergeRequest,
    survey: &Survey,
    machine: Option<&Machine>,
) -> Result<Vec<PathBuf>, Error> {
    let MergeRequest::Flatten(names) = request else { return Ok(Vec::new()) };
    if names.is_empty() {
        return Ok(survey.heads.iter().map(|(_, path)| path.clone()).collect());
    }
    let of_name = |name: &String| {
        let head = survey.heads.iter().find(|(disk, _)| disk.as_str() == name).map(|(_, path)| path.clone());
        let by_other_name = || {
            let disks = machine.map(|machine| machine.disks.as_slice()).unwrap_or_default();
            let disk = select(vm, disks, name)?;
            disk.layer().map(|layer| layer.path.clone()).ok_or_else(|| vm::Error::NoSuchDisk {
                vm: vm.clone(),
                name: name.clone(),
                known: survey.heads.iter().map(|(disk, _)| disk.to_string()).collect(),
            })
        };
        head.map_or_else(by_other_name, Ok)
    };
    Ok(names.iter().map(of_name).collect::<Result<_, vm::Error>>()?)
}

fn refuse_busy(plan: &MergePlan, machine: &Machine) -> Result<(), Refusal> {
    if plan.disks.is_empty() {
        return Ok(());
    }
    refuse_migration(&plan.vm, machine)?;
    for disk in &machine.disks {
        if let Some(layer) = disk.layer() {
            refuse_job(&plan.vm, disk, &layer.nodes, machine)?;
            refuse_busy_bitmap(&plan.vm, disk, layer)?;
        }
    }
    Ok(())
}

/// Each disk's merges follow each other and free what they took, so the largest of each has to find room.
fn require_room(plan: &MergePlan) -> Result<(), Refusal> {
    let mut needed: BTreeMap<&Path, u64> = BTreeMap::new();
    for disk in &plan.disks {
        let largest = disk.merges.iter().filter_map(|merge| Some((merge.survivor()?, room(merge).ok()?.0)));
        let largest = largest.max_by_key(|(_, bytes)| *bytes);
        if let Some((survivor, bytes)) = largest.filter(|(survivor, _)| !aside::is_device(survivor)) {
            let sum = needed.entry(files::parent(survivor)).or_default();
            *sum = sum.saturating_add(bytes);
        }
    }
    let enough =
        needed.into_iter().try_for_each(|(dir, bytes)| space::require(dir, ByteSize(bytes)).map(drop));
    enough.map_err(|fault: SpaceError| fault.into())
}

/// The storage daemon has no keys.
fn refuse_encrypted(plan: &MergePlan, machine: Option<&Machine>) -> Result<(), Refusal> {
    let copies = offline(plan, machine).filter(|merge| merge.survivor().is_some());
    let layers = copies.flat_map(Merge::files).map(|path| (path, ImageFormat::Qcow2));
    encrypted::refuse_offline(&plan.vm, layers)
}

/// Merges of layers that QEMU has not open.
fn offline<'a>(plan: &'a MergePlan, machine: Option<&'a Machine>) -> impl Iterator<Item = &'a Merge> {
    let is_online =
        move |merge: &Merge| machine.is_some_and(|machine| !machine.nodes_on(merge.member()).is_empty());
    plan.merges().filter(move |merge| !is_online(merge))
}

/// What QEMU has not open itself must not be open elsewhere.
fn require_free_files(plan: &MergePlan, machine: Option<&Machine>) -> Result<(), StepError> {
    offline(plan, machine).flat_map(Merge::files).try_for_each(|path| require_free(path, None))
}

/// What settling an interrupted merge came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SettledMerge {
    /// The snapshots that were being deleted: they are.
    pub deleted: Vec<Name>,
    /// Merges that were under way and are done.
    pub merged: usize,
    /// Merges that were under way and had not changed anything.
    pub broken_off: usize,
}

/// Brings what was under way to an end. What the plan had still to do is left for a later merge.
///
/// # Errors
/// The journal knows of it still, and this can be tried again.
pub(crate) async fn settle_pending(
    session: Option<&Session>,
    pending: &PendingOperation,
    state: &State,
) -> Result<SettledMerge, StepError> {
    let plan: MergePlan = pending.plan()?;
    let in_flight = pending.notes::<Vec<InFlight>>()?.unwrap_or_default();
    let mut history = state.history(Some(&pending.vm))?;
    // It may have died before its first step.
    mark_deleted(&mut history, &plan.snapshots, pending.started);
    let ledger = Ledger::new(state.resume(pending.id)?, &pending.vm, history, in_flight.clone());
    ledger.open()?;
    remove_beside(&plan, session, &ledger).await?;
    let settler = Settler { session, ledger: &ledger };
    let mut settled = SettledMerge {
        deleted: plan.snapshots.iter().map(|snapshot| snapshot.name.clone()).collect(),
        merged: 0,
        broken_off: 0,
    };
    for merge in &in_flight {
        if let Some(session) = session {
            jobs::end(&session.qmp, &merge.job).await?;
        }
        match settler.settle(merge).await? {
            Became::Done => settled.merged += 1,
            Became::NotDone => settled.broken_off += 1,
        }
    }
    ledger.close()?;
    Ok(settled)
}
