//! Snapshots inside the images, for users who keep one qcow2 file for each disk: QEMU saves memory, device state and all disks
//! at the same instant, and the guest stands still meanwhile.
//!
//! QEMU's jobs do it all (`snapshot-save`, `snapshot-load`, `snapshot-delete`; qapi/migration.json, since 6.0), hold the guest and let it
//! go on, whatever becomes of snapctl. Where the VM does not run, `qemu-img snapshot` does.

use std::path::Path;
use std::time::Duration;

use agent_client::{BlockNode, JobDismiss, JobInfo, Qmp, SnapshotDelete, SnapshotLoad, SnapshotSave};
use jiff::Timestamp;
use model::{
    History, ImageFormat, InternalDisk, InternalRecord, Name, OperationId, PlannedStep, PlatformFile,
    SnapshotId, SnapshotRecord,
};
use serde::{Deserialize, Serialize};
use vm::{Feature, Machine, Operation, PendingOperation, Session, State, require_features};

use crate::create::{Created, Interrupt, fate, random_bits, step_error};
use crate::error::{Error, Fate, StepError};
use crate::jobs::{CONCLUDED, find, tell, wait_for};
use crate::memory;
use crate::merge::Going;
use crate::plan::{CreatePlan, CreateRequest, Dice, Refusal, SkippedDisk};
use crate::platform;
use crate::qemu_img;
use crate::recover::{Recovered, require_free};
use crate::revert::{RevertRequest, branch_name};
use crate::target::{Target, observe};

/// The kinds of these operations in the journal.
pub(crate) const CREATE: &str = "internal-create";
pub(crate) const REVERT: &str = "internal-revert";
/// Ticked off when what was there is kept, or given up; and when the VM is back.
const KEPT: &str = "internal.kept";
const LOADED: &str = "internal.loaded";
/// How long a job may copy the memory: longer than any takes, since it cannot be broken off.
const LIMIT: Duration = Duration::from_secs(24 * 3600);
/// What the tags of ours begin with.
const TAG: &str = "snapctl-";

/// Source: the "Since" lines of qapi/migration.json.
const FEATURES: [Feature; 3] = [
    Feature { command: "snapshot-save", argument: None, since: "6.0" },
    Feature { command: "snapshot-load", argument: None, since: "6.0" },
    Feature { command: "snapshot-delete", argument: None, since: "6.0" },
];

/// Everything that [`create_internal`] will do, decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InternalPlan {
    /// The operation's id.
    pub operation: OperationId,
    /// Where it will be.
    pub internal: InternalRecord,
    /// What else will be entered in the catalogue, but for the time.
    pub record: SnapshotRecord,
    /// Drives that are left out, and why.
    pub skipped: Vec<SkippedDisk>,
}

impl InternalPlan {
    /// The plan for people.
    pub fn steps(&self) -> Vec<PlannedStep> {
        let disks: Vec<String> =
            self.internal.disks.iter().map(|disk| disk.path.display().to_string()).collect();
        let step = |step: String, undo: Option<String>| PlannedStep { step, undo };
        let copy = |file: &PlatformFile| {
            let (live, copy) = (file.live.display(), file.copy.display());
            step(format!("copy {live} to {copy}"), Some(format!("remove {copy}")))
        };
        let mut steps: Vec<PlannedStep> = self.record.platform.iter().map(copy).collect();
        steps.push(step(
            format!("hold the guest, save memory and disks inside {}, and let it go on", disks.join(", ")),
            Some("delete that".into()),
        ));
        steps.push(step(format!("enter snapshot {} in the catalogue", self.record.name), None));
        steps
    }
}

/// What it comes to when a VM goes back to a snapshot inside its images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InternalRevert {
    /// The operation's id.
    pub operation: OperationId,
    /// The VM.
    pub vm: Name,
    /// The snapshot.
    pub snapshot: Going,
    /// Where it is.
    pub internal: InternalRecord,
    /// What is there now, as a snapshot of its own; none if it is thrown away.
    pub branch: Option<SnapshotRecord>,
    /// Whether QEMU has the images open.
    pub online: bool,
}

impl InternalRevert {
    /// The plan for people.
    pub fn steps(&self) -> Vec<PlannedStep> {
        let step = |step: String| PlannedStep { step, undo: None };
        let save = self
            .branch
            .as_ref()
            .map(|branch| step(format!("save what is there now as snapshot {}", branch.name)));
        let what = if self.online { "memory and disks" } else { "the disks" };
        let load = step(format!("go back to {what} of snapshot {}", self.snapshot.name));
        save.into_iter().chain([load]).collect()
    }
}

/// Decides what [`create_internal`] would do, and touches nothing.
///
/// # Errors
/// [`Error::Refused`]; [`Error::Vm`].
pub async fn plan_internal(
    session: &Session,
    state: &State,
    request: &CreateRequest,
) -> Result<InternalPlan, Error> {
    require_features(&session.vm, &session.qmp, &session.paths, &FEATURES).await?;
    let mut machine = session.observe().await?;
    let known = state.history(None)?;
    crate::lineage::name_by_history(&mut machine.disks, &known);
    let (dice, platform) = (Dice::roll(), session.platform(&machine).await?);
    // What makes a point on overlays impossible makes one inside the images impossible too.
    let request = CreateRequest { memory: Some(crate::MemoryWish::Best), ..request.clone() };
    let plan = CreatePlan::new(&session.vm, &request, &machine, &platform, &known, dice)?;
    refuse(&plan, &request)?;
    let ram = memory::ram(&session.qmp).await.map_err(vm::Error::conversation(&session.vm))?;
    let disks: Vec<InternalDisk> = plan
        .disks
        .iter()
        .map(|disk| InternalDisk {
            disk: disk.disk.clone(),
            path: disk.base.clone(),
            virtual_size: disk.virtual_size,
        })
        .collect();
    if let Some(first) = disks.first() {
        memory::require_room(host::files::parent(&first.path), ram).map_err(Refusal::NoRoom)?;
    }
    let internal = InternalRecord { tag: format!("{TAG}{}", plan.snapshot), disks };
    let record = SnapshotRecord {
        description: plan.description,
        labels: plan.labels,
        platform: plan.platform,
        parent: plan.parent,
        ..SnapshotRecord::new(plan.snapshot, plan.vm, plan.name, dice.now)
    };
    Ok(InternalPlan { operation: plan.operation, internal, record, skipped: plan.skipped })
}

fn refuse(plan: &CreatePlan, request: &CreateRequest) -> Result<(), Refusal> {
    if !request.disks.is_empty() {
        return Err(Refusal::InternalOfSome);
    }
    if let Some(disk) = plan.disks.iter().find(|disk| disk.format != ImageFormat::Qcow2) {
        return Err(Refusal::NotInternal { disk: disk.disk.clone(), format: disk.format });
    }
    Ok(())
}

/// Takes a snapshot inside the images of the VM behind `session`.
///
/// Operations that were interrupted earlier have to be settled before, see [`crate::recover`].
///
/// # Errors
/// As [`crate::create()`].
pub async fn create_internal(
    session: &Session,
    state: &State,
    request: &CreateRequest,
    interrupt: &Interrupt,
) -> Result<Created, Error> {
    let plan = plan_internal(session, state, request).await?;
    interrupt.check().map_err(|source| step_error("starting", source, Fate::Untouched))?;
    let vm = plan.record.vm.clone();
    let operation = state.begin(plan.operation, &vm, CREATE, &plan)?;
    let mut warnings = Vec::new();
    let saved = save(session, &plan).await;
    if let Err(source) = saved {
        let left = undo(session, &plan).await;
        return Err(step_error("saving the snapshot", source, fate(operation, left)));
    }
    let finished = platform::refresh(&plan.record.platform, &mut warnings)
        .and_then(|()| enter(&plan, operation, Timestamp::now()));
    let record = finished.map_err(|source| {
        let stands = format!("it is inside the images; 'snapctl recover {vm}' finishes it");
        step_error("finishing the snapshot", source, Fate::Interrupted(stands))
    })?;
    Ok(Created { record, skipped: plan.skipped, reason: None, warnings })
}

async fn save(session: &Session, plan: &InternalPlan) -> Result<(), StepError> {
    host::fault::point("internal.begun")?;
    platform::copy(&plan.record.platform)?;
    save_tag(session, &plan.internal, &job(plan.operation, "save")).await?;
    Ok(host::fault::point("internal.saved")?)
}

fn job(operation: OperationId, what: &str) -> String {
    format!("i{}-{what}", operation.tag())
}

async fn save_tag(session: &Session, internal: &InternalRecord, job: &str) -> Result<(), StepError> {
    let machine = session.observe().await?;
    let nodes = nodes(&machine, internal)?;
    let vmstate = nodes.first().cloned().unwrap_or_default();
    let save = SnapshotSave { job_id: job.to_owned(), tag: internal.tag.clone(), vmstate, devices: nodes };
    tell(&session.qmp, &save).await?;
    finish(&session.qmp, job).await?;
    match missing(&session.observe().await?, internal) {
        None => Ok(()),
        Some(path) => Err(StepError::NotInside { path: path.to_owned() }),
    }
}

/// The nodes of the images, all of which are active layers.
fn nodes(machine: &Machine, internal: &InternalRecord) -> Result<Vec<String>, StepError> {
    let node = |disk: &InternalDisk| {
        let layers = machine.disks.iter().filter_map(|disk| disk.layer());
        let layer = layers.into_iter().find(|layer| layer.path == disk.path);
        layer.map(|layer| layer.node.clone()).ok_or_else(|| StepError::OtherFile(disk.path.clone()))
    };
    internal.disks.iter().map(node).collect()
}

/// Waits for a job's end, however long that takes, and forgets it.
async fn finish(qmp: &Qmp, job: &str) -> Result<(), StepError> {
    let ended = ended(qmp, job).await?;
    tell(qmp, &JobDismiss { id: job.to_owned() }).await?;
    ended.error.map_or(Ok(()), |error| Err(StepError::Job { job: job.to_owned(), error }))
}

async fn ended(qmp: &Qmp, job: &str) -> Result<JobInfo, StepError> {
    let ended = wait_for(qmp, job, CONCLUDED, LIMIT).await?;
    ended.ok_or_else(|| StepError::JobGone { job: job.to_owned() })
}

/// An image that does not have the tag, if one has not.
fn missing<'a>(machine: &Machine, internal: &'a InternalRecord) -> Option<&'a Path> {
    let disks = internal.disks.iter().map(|disk| disk.path.as_path());
    disks.into_iter().find(|path| !is_inside(machine, path, &internal.tag))
}

/// Whether an image that QEMU has open has the tag.
fn is_inside(machine: &Machine, path: &Path, tag: &str) -> bool {
    let names = machine.nodes_on(path);
    let is_on_it = |node: &&BlockNode| node.node_name.as_ref().is_some_and(|name| names.contains(name));
    let image = machine.nodes.iter().filter(is_on_it).find(|node| node.drv == "qcow2");
    image.is_some_and(|node| node.image.snapshots.iter().any(|snapshot| snapshot.name == tag))
}

fn enter(
    plan: &InternalPlan,
    operation: Operation<'_>,
    made: Timestamp,
) -> Result<SnapshotRecord, StepError> {
    let internal = Some(plan.internal.clone());
    let record = SnapshotRecord { created: made, internal, ..plan.record.clone() };
    operation.done(&record)?;
    host::fault::point("internal.recorded")?;
    Ok(record)
}

/// Takes back what there is of it. Returns what could not be taken back.
async fn undo(session: &Session, plan: &InternalPlan) -> Vec<String> {
    let mut left = platform::remove(&plan.record.platform);
    if let Err(fault) = remove(Some(session), &plan.internal, plan.operation).await {
        left.push(format!("{} inside its images ({fault})", plan.internal.tag));
    }
    left
}

/// Deletes what is inside those of the images that QEMU has open.
async fn remove_online(
    session: &Session,
    machine: &Machine,
    internal: &InternalRecord,
    job: &str,
) -> Result<(), StepError> {
    let is_there = |disk: &&InternalDisk| is_inside(machine, &disk.path, &internal.tag);
    let disks: Vec<InternalDisk> = internal.disks.iter().filter(is_there).cloned().collect();
    if disks.is_empty() {
        return Ok(());
    }
    let there = InternalRecord { tag: internal.tag.clone(), disks };
    let devices = nodes(machine, &there)?;
    tell(&session.qmp, &SnapshotDelete { job_id: job.to_owned(), tag: there.tag, devices }).await?;
    finish(&session.qmp, job).await
}

/// Whether an image that no QEMU has open has the tag.
async fn has_offline(path: &Path, tag: &str) -> Result<bool, StepError> {
    let words = ["info", "--output=json", "-f", "qcow2"].map(AsRef::as_ref);
    let output = qemu_img::output(words.into_iter().chain([path.as_os_str()])).await?;
    if !output.status.success() {
        return Err(qemu_img::failed(&output));
    }
    let info: agent_client::ImageInfo =
        serde_json::from_slice(&output.stdout).map_err(|fault| StepError::QemuImg(fault.to_string()))?;
    Ok(info.snapshots.iter().any(|snapshot| snapshot.name == tag))
}

async fn offline(verb: &str, tag: &str, path: &Path) -> Result<(), StepError> {
    require_free(path, None)?;
    let words = ["snapshot", "-q", verb, tag].map(AsRef::as_ref);
    qemu_img::run(words.into_iter().chain([path.as_os_str()])).await?;
    Ok(storage::overlay::make_durable(path)?)
}

/// Deletes what is inside the images. What is gone already is no fault, and an image that is gone neither.
pub(crate) async fn remove(
    session: Option<&Session>,
    internal: &InternalRecord,
    operation: OperationId,
) -> Result<(), StepError> {
    let machine = observe(session).await?;
    if let (Some(session), Some(machine)) = (session, &machine) {
        remove_online(session, machine, internal, &job(operation, "delete")).await?;
    }
    let is_open = |path: &Path| machine.as_ref().is_some_and(|machine| !machine.nodes_on(path).is_empty());
    for disk in internal.disks.iter().filter(|disk| disk.path.exists() && !is_open(&disk.path)) {
        if has_offline(&disk.path, &internal.tag).await? {
            offline("-d", &internal.tag, &disk.path).await?;
        }
    }
    Ok(())
}

/// Refuses what would be done to a snapshot inside an image that is frozen by now: others stand on it.
pub(crate) fn refuse_frozen(known: &History, name: &Name, internal: &InternalRecord) -> Result<(), Refusal> {
    match internal.disks.iter().find(|disk| known.holder(&disk.path).is_some()) {
        Some(disk) => Err(Refusal::InternalBelow { snapshot: name.clone(), path: disk.path.clone() }),
        None => Ok(()),
    }
}

/// Decides what [`revert_internal`] would do, and touches nothing.
///
/// # Errors
/// [`Error::Refused`]; [`Error::Vm`].
pub async fn plan_revert_internal(
    target: &Target<'_>,
    state: &State,
    snapshot: &SnapshotRecord,
    internal: &InternalRecord,
    request: &RevertRequest,
) -> Result<InternalRevert, Error> {
    let vm = target.vm();
    let known = state.history(None)?;
    if !request.disks.is_empty() {
        return Err(Refusal::InternalOfSome.into());
    }
    refuse_frozen(&known, &snapshot.name, internal)?;
    if let Some(session) = target.session() {
        require_features(vm, &session.qmp, &session.paths, &FEATURES).await?;
    }
    let now = Timestamp::now();
    let id = SnapshotId::from_bits(random_bits());
    let branch = (!request.discard).then(|| SnapshotRecord {
        description: Some(format!("what was there before the revert to {}", snapshot.name)),
        internal: Some(InternalRecord { tag: format!("{TAG}{id}"), disks: internal.disks.clone() }),
        ..SnapshotRecord::new(id, vm.clone(), branch_name(vm, &known, now), now)
    });
    Ok(InternalRevert {
        operation: OperationId::from_bits(random_bits()),
        vm: vm.clone(),
        snapshot: Going { id: snapshot.id, name: snapshot.name.clone() },
        internal: internal.clone(),
        branch,
        online: target.session().is_some(),
    })
}

/// Lets a VM go on from a snapshot inside its images: with its memory where it runs.
///
/// # Errors
/// As [`crate::revert()`].
pub async fn revert_internal(
    target: &Target<'_>,
    state: &State,
    snapshot: &SnapshotRecord,
    internal: &InternalRecord,
    request: &RevertRequest,
) -> Result<InternalRevert, Error> {
    let plan = plan_revert_internal(target, state, snapshot, internal, request).await?;
    let operation = state.begin(plan.operation, &plan.vm, REVERT, &plan)?;
    let went = go_back(target.session(), &plan, operation, state).await;
    went.map_err(|source| {
        let stands = format!("'snapctl recover {}' looks, and goes on", plan.vm);
        step_error("going back", source, Fate::Interrupted(stands))
    })?;
    Ok(plan)
}

/// Saves what is there, enters that, and goes back. Each step may be done already.
async fn go_back(
    session: Option<&Session>,
    plan: &InternalRevert,
    operation: Operation<'_>,
    state: &State,
) -> Result<(), StepError> {
    let mut history = state.history(Some(&plan.vm))?;
    if let Some(branch) = &plan.branch
        && let Some(internal) = &branch.internal
        && !history.snapshots.iter().any(|known| known.id == branch.id)
    {
        save_all(session, internal, &job(plan.operation, "save")).await?;
        history.enter(branch.clone());
        operation.rewrite(KEPT, &(), &plan.vm, &history)?;
    }
    operation.tick(KEPT)?;
    host::fault::point(KEPT)?;
    match session {
        Some(session) => load(session, plan, &operation).await?,
        None => {
            for disk in &plan.internal.disks {
                offline("-a", &plan.internal.tag, &disk.path).await?;
            }
            operation.tick(LOADED)?;
        }
    }
    host::fault::point(LOADED)?;
    Ok(operation.finish(&plan.vm, &history)?)
}

async fn save_all(session: Option<&Session>, internal: &InternalRecord, job: &str) -> Result<(), StepError> {
    let Some(session) = session else {
        for disk in &internal.disks {
            if !has_offline(&disk.path, &internal.tag).await? {
                offline("-c", &internal.tag, &disk.path).await?;
            }
        }
        return Ok(());
    };
    let machine = session.observe().await?;
    if missing(&machine, internal).is_none() {
        return Ok(());
    }
    remove_online(session, &machine, internal, job).await?;
    save_tag(session, internal, job).await
}

/// The guest runs on from there as soon as the job has ended: that is ticked off before QEMU forgets it.
async fn load(session: &Session, plan: &InternalRevert, operation: &Operation<'_>) -> Result<(), StepError> {
    let machine = session.observe().await?;
    let devices = nodes(&machine, &plan.internal)?;
    let (job, tag) = (job(plan.operation, "load"), plan.internal.tag.clone());
    let vmstate = devices.first().cloned().unwrap_or_default();
    tell(&session.qmp, &SnapshotLoad { job_id: job.clone(), tag, vmstate, devices }).await?;
    let loaded = ended(&session.qmp, &job).await?;
    if loaded.error.is_none() {
        operation.tick(LOADED)?;
    }
    finish(&session.qmp, &job).await
}

/// Settles an operation of these kinds that was interrupted.
///
/// # Errors
/// The journal knows of it still, and this can be tried again.
pub(crate) async fn settle_pending(
    session: Option<&Session>,
    pending: &PendingOperation,
    state: &State,
) -> Result<Recovered, StepError> {
    let mut is_loaded = pending.step == LOADED;
    if let Some(session) = session {
        for what in ["save", "load", "delete"] {
            let job = job(pending.id, what);
            if find(&session.qmp, &job).await?.is_some() {
                // Whether another one did it shows in what is there.
                let ended = finish(&session.qmp, &job).await;
                is_loaded |= what == "load" && ended.is_ok();
            }
        }
    }
    let operation = state.resume(pending.id)?;
    match pending.kind == REVERT {
        true => settle_revert(session, pending, operation, state, is_loaded).await,
        false => settle_create(session, pending, operation).await,
    }
}

/// Once what was there is kept, nothing is lost by going on; before that nothing was done.
async fn settle_revert(
    session: Option<&Session>,
    pending: &PendingOperation,
    operation: Operation<'_>,
    state: &State,
    is_loaded: bool,
) -> Result<Recovered, StepError> {
    let plan: InternalRevert = pending.plan()?;
    let done = is_loaded || pending.step == KEPT;
    if is_loaded {
        operation.finish(&plan.vm, &state.history(Some(&plan.vm))?)?;
    } else if done {
        go_back(session, &plan, operation, state).await?;
    } else {
        if let Some(internal) = plan.branch.as_ref().and_then(|branch| branch.internal.as_ref()) {
            remove(session, internal, plan.operation).await?;
        }
        operation.undone()?;
    }
    Ok(Recovered::Reverted { vm: plan.vm, snapshot: plan.snapshot.name, done })
}

/// It is entered if every image has it, and taken back otherwise.
async fn settle_create(
    session: Option<&Session>,
    pending: &PendingOperation,
    operation: Operation<'_>,
) -> Result<Recovered, StepError> {
    let plan: InternalPlan = pending.plan()?;
    let is_whole = match session {
        Some(session) => missing(&session.observe().await?, &plan.internal).is_none(),
        None => all_offline(&plan.internal).await?,
    };
    if is_whole {
        let snapshot = Box::new(enter(&plan, operation, pending.started)?);
        return Ok(Recovered::Finished { snapshot });
    }
    remove(session, &plan.internal, plan.operation).await?;
    let left = platform::remove(&plan.record.platform);
    if !left.is_empty() {
        return Err(StepError::LeftBehind(left));
    }
    operation.undone()?;
    Ok(Recovered::Undone { name: plan.record.name })
}

async fn all_offline(internal: &InternalRecord) -> Result<bool, StepError> {
    for disk in &internal.disks {
        require_free(&disk.path, None)?;
        if !has_offline(&disk.path, &internal.tag).await? {
            return Ok(false);
        }
    }
    Ok(true)
}
