//! Taking a snapshot: decide, journal, do, look.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use agent_client::{Agent, FreezeStatus};
use jiff::Timestamp;
use model::{Fingerprint, ImageFormat, LayerRecord, MemoryRecord, SnapshotRecord};
use serde::Serialize;
use storage::{Inode, fingerprint, seal};
use tokio::sync::Mutex;
use vm::{FEATURES, Machine, Operation, Registry, Session, State, open_agent, require_features};

use crate::aside;
use crate::error::{Error, Fate, StepError};
use crate::frozen;
use crate::lineage::name_by_history;
use crate::memory::{self, Memory};
use crate::overlays::{self, Backing};
use crate::pause::Pauser;
use crate::plan::{CreatePlan, CreateRequest, Dice, FreezePlan, Refusal};
use crate::platform;
use crate::point::{GuardProgram, NoPoint, Point, Quiescer, Switch, sync_first, take, take_frozen};

/// How soon a signal ends a step that takes long.
const INTERRUPT_POLL: Duration = Duration::from_millis(20);

/// How this executable is started again for what must not depend on its life.
#[derive(Clone, Debug)]
pub struct Guards {
    /// As the guard that thaws a frozen guest.
    pub thaw: GuardProgram,
    /// As the guard that lets a held guest go on.
    pub resume: GuardProgram,
}

/// A snapshot that was taken.
#[derive(Debug)]
pub struct Created {
    /// What was entered in the catalogue.
    pub record: SnapshotRecord,
    /// Drives that it leaves out.
    pub skipped: Vec<crate::SkippedDisk>,
    /// Why the memory was not saved live, if it was not and that was not asked for.
    pub reason: Option<String>,
    /// What a person should read.
    pub warnings: Vec<Warning>,
}

/// Something that went otherwise than it should, and did not stop the snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "warning", rename_all = "kebab-case")]
pub enum Warning {
    /// The guest was not frozen, and that was not required.
    NotQuiesced {
        /// Why.
        why: String,
    },
    /// The freeze ended before the point was made, so that it is only crash-consistent.
    FreezeBroken {
        /// How it shows.
        why: String,
    },
    /// A file of the platform was changed while the point was made.
    PlatformChanged {
        /// The file.
        path: PathBuf,
        /// What that means.
        why: String,
    },
    /// The point was made without the memory.
    MemoryLost {
        /// Why.
        why: String,
    },
    /// A frozen layer could not be protected against writing.
    NotSealed {
        /// The layer.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotQuiesced { why } => write!(f, "the guest was not quiesced: {why}"),
            Self::FreezeBroken { why } => {
                write!(f, "{why}: the snapshot was taken, but it is only crash-consistent")
            }
            Self::PlatformChanged { path, why } => write!(f, "{}: {why}", path.display()),
            Self::MemoryLost { why } => write!(f, "the snapshot holds the disks alone: {why}"),
            Self::NotSealed { path, why } => {
                write!(f, "{} is frozen and not protected against writing: {why}", path.display())
            }
        }
    }
}

/// A signal that came meanwhile. Before the point it undoes; after it, work is finished first.
#[derive(Debug, Default)]
pub struct Interrupt(Arc<AtomicUsize>);

impl Interrupt {
    /// Where the number of the signal goes; 0 means none. A signal handler may store it at any moment, so
    /// that it is seen at the next step also if nothing was awaited in between.
    pub fn flag(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.0)
    }

    /// The signal that came, if one did.
    pub fn raised(&self) -> Option<i32> {
        i32::try_from(self.0.load(Ordering::Relaxed)).ok().filter(|signal| *signal != 0)
    }

    /// Waits until a signal comes, for steps that may take long.
    pub(crate) async fn wait(&self) {
        while self.raised().is_none() {
            tokio::time::sleep(INTERRUPT_POLL).await;
        }
    }

    /// Fails if a signal came.
    pub(crate) fn check(&self) -> Result<(), StepError> {
        self.raised().map_or(Ok(()), |signal| Err(StepError::Signal(signal)))
    }
}

/// A plan with what was observed for it.
#[derive(Debug)]
struct Decided {
    plan: CreatePlan,
    machine: Machine,
}

/// Decides what [`create`] would do, and touches nothing.
///
/// # Errors
/// [`Error::Refused`]; [`Error::Vm`].
pub async fn plan_create(
    session: &Session,
    state: &State,
    request: &CreateRequest,
) -> Result<CreatePlan, Error> {
    decide(session, state, request).await.map(|decided| decided.plan)
}

/// Takes a snapshot of the VM behind `session`.
///
/// Operations that were interrupted earlier have to be settled before, see [`crate::recover`].
///
/// # Errors
/// Each variant of [`Error`] but those about finding snapshots; it says what the failure leaves behind. The
/// point that was made stands in spite of [`Error::ThawUnconfirmed`], if that names a snapshot.
pub async fn create(
    session: &Session,
    state: &State,
    request: &CreateRequest,
    guards: &Guards,
    interrupt: &Interrupt,
) -> Result<Created, Error> {
    let Decided { plan, machine } = decide(session, state, request).await?;
    let mut warnings = Vec::new();
    let quiescer = match &plan.freeze {
        Some(freeze) => tokio::select! {
            quiescer = find_quiescer_or_warn(session, &machine, freeze, &mut warnings) => quiescer?,
            () = interrupt.wait() => {
                let signal = interrupt.raised().unwrap_or_default();
                return Err(Error::Interrupted { signal, fate: Fate::Untouched });
            }
        },
        None => None,
    };
    let run = Run { session, plan: &plan, interrupt };
    run.check_host(&machine).map_err(|source| untouched("checking the host", source))?;
    let operation = state.begin(plan.operation, &plan.vm, "create", &plan)?;
    let mut made = Vec::new();
    if let Err((step, source)) = run.prepare(&operation, &mut made).await {
        return Err(run.undo(operation, &made, |fate| step_error(step, source, fate)).await);
    }
    let taken = run.take(guards, quiescer, &mut warnings).await;
    let now = Timestamp::now();
    let point = match taken {
        Ok(point) => point,
        Err(no_point) => {
            let fault = run.without_point(operation, &made, no_point).await;
            remember_frozen(session, state, &fault);
            return Err(fault);
        }
    };
    let made_at = point.made_at.unwrap_or(now);
    let finished = run.finish(operation, made_at, &point, &mut warnings).await;
    let record = finished.map_err(|source| {
        let stands = format!("the point in time is made; 'snapctl recover {}' finishes it", plan.vm);
        step_error("finishing the snapshot", source, Fate::Interrupted(stands))
    })?;
    match point.frozen_still {
        None => {
            let reason = plan.memory.as_ref().and_then(|memory| memory.reason.clone());
            Ok(Created { record, skipped: plan.skipped.clone(), reason, warnings })
        }
        Some(source) => {
            let (vm, snapshot) = (plan.vm.clone(), Some(record.name));
            let fault = Error::ThawUnconfirmed { vm, source, snapshot, fate: Fate::Untouched };
            remember_frozen(session, state, &fault);
            Err(fault)
        }
    }
}

/// The guard keeps trying as long as it lives; the next command tries too.
pub(crate) fn remember_frozen(session: &Session, state: &State, fault: &Error) {
    if let Error::ThawUnconfirmed { vm, .. } = fault
        && let Err(fault) = frozen::remember(session, state)
    {
        tracing::warn!("that {vm} may be frozen could not be written to the journal: {fault}");
    }
}

async fn decide(session: &Session, state: &State, request: &CreateRequest) -> Result<Decided, Error> {
    require_features(&session.vm, &session.qmp, &session.paths, &FEATURES).await?;
    let mut machine = session.observe().await?;
    // Those of every VM: one may have been registered under another name before.
    let known = state.history(None)?;
    name_by_history(&mut machine.disks, &known);
    let platform = session.platform(&machine).await?;
    let mut plan = CreatePlan::new(&session.vm, request, &machine, &platform, &known, Dice::roll())?;
    refuse_devices(&plan, request)?;
    if let Some(wish) = request.memory {
        plan.memory = Some(memory::plan(session, &plan, wish).await?);
    }
    Ok(Decided { plan, machine })
}

/// Beside a device an overlay has no place, unless the user gives it one.
fn refuse_devices(plan: &CreatePlan, request: &CreateRequest) -> Result<(), Refusal> {
    if let Some(dir) = request.overlay_dir.as_ref().filter(|dir| !dir.is_dir()) {
        return Err(Refusal::NoOverlayDir { dir: dir.clone() });
    }
    if request.overlay_dir.is_some() {
        return Ok(());
    }
    let (devices, files): (Vec<_>, Vec<_>) = plan.disks.iter().partition(|disk| aside::is_device(&disk.base));
    let Some(device) = devices.first() else { return Ok(()) };
    Err(Refusal::DiskUnfit {
        vm: plan.vm.clone(),
        disk: device.disk.clone(),
        reason: "its image is on a block device, beside which an overlay has no place; --overlay-dir DIR gives it one"
            .into(),
        others: files.into_iter().map(|disk| disk.disk.clone()).collect(),
    })
}

/// Connects the agent and makes sure that it can freeze, before anything is made.
///
/// None if it cannot and the user can do without.
pub(crate) async fn find_quiescer_or_warn(
    session: &Session,
    machine: &Machine,
    freeze: &FreezePlan,
    warnings: &mut Vec<Warning>,
) -> Result<Option<Quiescer>, Error> {
    match find_quiescer(session, machine, freeze).await {
        Ok(quiescer) => Ok(Some(quiescer)),
        Err(reason) if freeze.required => {
            Err(Error::NotQuiesced { vm: session.vm.clone(), reason, fate: Fate::Untouched })
        }
        Err(why) => {
            warnings.push(Warning::NotQuiesced { why });
            Ok(None)
        }
    }
}

async fn find_quiescer(
    session: &Session,
    machine: &Machine,
    freeze: &FreezePlan,
) -> Result<Quiescer, String> {
    if !machine.status.running {
        return Err(format!("it is {}", machine.status.status));
    }
    let (vm, definition) = (&session.vm, &session.definition);
    if definition.agent.is_none() {
        let file = Registry::<vm::VmDefinition>::new(&session.paths).file(vm);
        return Err(format!("no agent socket is registered; write agent = \"PATH\" into {}", file.display()));
    }
    let agent = open_agent(vm, definition, &machine.chardevs, session.wait, session.timeout).await;
    let agent = agent.map_err(|fault| {
        let said = fault.to_string();
        said.strip_prefix(&format!("{vm}: ")).unwrap_or(&said).to_owned()
    })?;
    let command = match freeze.mountpoints.as_slice() {
        [] => "guest-fsfreeze-freeze",
        _ => "guest-fsfreeze-freeze-list",
    };
    // Asked first: a frozen agent says of nearly every command that it is switched off.
    if status(&agent).await.map_err(|fault| fault.to_string())? == FreezeStatus::Frozen {
        return Err(format!("somebody else has frozen it already; 'snapctl guest thaw {vm}' ends that"));
    }
    ready_to_freeze(&agent, command).await.map_err(|fault| fault.to_string())?;
    // An agent too old to tell its system cannot tell Windows either; the freeze works all the same.
    let os = agent.os().await.unwrap_or_default();
    Ok(Quiescer { agent, os })
}

async fn status(agent: &Agent) -> Result<FreezeStatus, agent_client::Error> {
    agent.require("guest-fsfreeze-status").await?;
    agent.freeze_status().await
}

async fn ready_to_freeze(agent: &Agent, freeze: &str) -> Result<(), agent_client::Error> {
    for command in [freeze, "guest-fsfreeze-thaw"] {
        agent.require(command).await?;
    }
    Ok(())
}

/// One run of [`create`].
struct Run<'a> {
    session: &'a Session,
    plan: &'a CreatePlan,
    interrupt: &'a Interrupt,
}

impl Run<'_> {
    fn check_host(&self, machine: &Machine) -> Result<(), StepError> {
        for disk in &self.plan.disks {
            if machine.has_open(&disk.base) == Some(false) {
                return Err(StepError::OtherFile(disk.base.clone()));
            }
        }
        overlays::require_room(&self.plan.disks)?;
        self.interrupt.check()
    }

    /// A boundary between two steps before the point.
    fn step(&self, name: &str) -> Result<(), StepError> {
        host::fault::point(name)?;
        self.interrupt.check()
    }

    async fn prepare(
        &self,
        operation: &Operation<'_>,
        made: &mut Vec<Inode>,
    ) -> Result<(), (&'static str, StepError)> {
        self.step("create.begun").map_err(|fault| ("starting", fault))?;
        let files = overlays::make_files(&self.plan.disks, made);
        files.map_err(|fault| ("creating the overlays", fault.into()))?;
        if let Some(memory) = &self.plan.memory {
            memory::make_file(self.plan, memory).map_err(|fault| ("making room for the memory", fault))?;
        }
        platform::copy(&self.plan.platform)
            .map_err(|fault| ("copying firmware variables and TPM state", fault))?;
        self.step("create.files").map_err(|fault| ("creating the overlays", fault))?;
        operation.note("create.files", &made).map_err(|fault| ("writing the journal", fault.into()))?;
        let opened = overlays::open(&self.session.qmp, &self.plan.disks, Backing::Null).await;
        opened.map_err(|fault| ("opening the overlays in QEMU", fault))?;
        self.step("create.opened").map_err(|fault| ("opening the overlays in QEMU", fault))?;
        overlays::verify(&self.plan.disks).map_err(|fault| ("verifying the overlays", fault))?;
        operation.tick("create.prepared").map_err(|fault| ("writing the journal", fault.into()))?;
        self.step("create.prepared").map_err(|fault| ("verifying the overlays", fault))
    }

    async fn take(
        &self,
        guards: &Guards,
        quiescer: Option<Quiescer>,
        warnings: &mut Vec<Warning>,
    ) -> Result<Point, NoPoint> {
        let qmp = &self.session.qmp;
        if let Some(memory) = &self.plan.memory {
            let turn = Mutex::new(());
            let pauser = Pauser { session: self.session, guard: &guards.resume, turn: &turn };
            let step = |name: &str| self.step(name);
            return memory::take_with(self.plan, memory, &pauser, self.interrupt, &step).await;
        }
        let switch = Switch::Overlays { qmp, plan: self.plan };
        match (&self.plan.freeze, quiescer) {
            (Some(freeze), Some(quiescer)) => {
                let step = |name: &str| match name {
                    // The point may be made: from here on no signal takes it back.
                    "create.switched" => Ok(host::fault::point(name)?),
                    before => self.step(before),
                };
                if freeze.sync_first {
                    sync_first(&quiescer, self.interrupt).await;
                    step("create.synced").map_err(NoPoint::Failed)?;
                }
                take_frozen(&switch, freeze, quiescer, &guards.thaw, warnings, &step).await
            }
            _ => {
                let point = take(&switch).await?;
                host::fault::point("create.switched")
                    .map_err(|fault| NoPoint::Unknown(fault.into(), None))?;
                Ok(point)
            }
        }
    }

    /// After the point: look, seal, enter.
    async fn finish(
        &self,
        operation: Operation<'_>,
        made_at: Timestamp,
        point: &Point,
        warnings: &mut Vec<Warning>,
    ) -> Result<SnapshotRecord, StepError> {
        host::fault::point("create.thawed")?;
        platform::refresh(&self.plan.platform, warnings)?;
        if matches!(point.memory, Some(Memory::Saved { .. })) {
            operation.tick(memory::SAVED)?;
            host::fault::point(memory::SAVED)?;
        }
        let memory = memory::keep_or_tell(self.plan, point.memory.as_ref(), warnings).await?;
        let machine = self.session.observe().await?;
        require_switched(self.plan, &machine)?;
        let record = enter_verified(self.plan, operation, made_at, point, memory, warnings)?;
        host::fault::point("create.recorded")?;
        Ok(record)
    }

    /// There is no point, or nobody knows.
    async fn without_point(&self, operation: Operation<'_>, made: &[Inode], no_point: NoPoint) -> Error {
        let vm = self.plan.vm.clone();
        match no_point {
            NoPoint::NotQuiesced(reason) => {
                self.undo(operation, made, |fate| Error::NotQuiesced { vm, reason, fate }).await
            }
            NoPoint::FrozenStill(source @ agent_client::GuardError::Gone) => {
                self.undo(operation, made, |fate| step_error("freezing", source.into(), fate)).await
            }
            NoPoint::FrozenStill(source) => {
                let error = |fate| Error::ThawUnconfirmed { vm, source, snapshot: None, fate };
                self.undo(operation, made, error).await
            }
            NoPoint::Failed(source) => {
                self.undo(operation, made, |fate| step_error("taking the snapshot", source, fate)).await
            }
            NoPoint::Unknown(cause, unthawed) => {
                let stands = format!(
                    "the point in time may be made or not; 'snapctl recover {vm}' looks, and finishes or undoes it"
                );
                let fate = Fate::Interrupted(stands);
                match unthawed {
                    Some(source @ agent_client::GuardError::ThawUnconfirmed { .. }) => {
                        Error::ThawUnconfirmed { vm, source, snapshot: None, fate }
                    }
                    _ => step_error("taking the snapshot", cause, fate),
                }
            }
        }
    }

    /// Undoes everything that [`Run::prepare`] did, in reverse, and tells how that went.
    async fn undo(
        &self,
        operation: Operation<'_>,
        made: &[Inode],
        error: impl FnOnce(Fate) -> Error,
    ) -> Error {
        let mut left = overlays::close(&self.session.qmp, &self.plan.disks).await;
        left.extend(self.plan.memory.iter().flat_map(memory::remove_files));
        left.extend(platform::remove(&self.plan.platform));
        // What QEMU still has open stays where it is.
        if left.is_empty() {
            left = overlays::remove_files(&self.plan.disks, made);
        } else {
            let files = self.plan.disks.iter().take(made.len());
            left.extend(files.map(|disk| disk.overlay.display().to_string()));
        }
        error(fate(operation, left))
    }
}

/// Ends an operation that was undone but for what is `left`, and tells how that went.
pub(crate) fn fate(operation: Operation<'_>, left: Vec<String>) -> Fate {
    if !left.is_empty() {
        return Fate::PartlyUndone(left);
    }
    match operation.undone() {
        Ok(()) => Fate::Undone,
        Err(fault) => Fate::PartlyUndone(vec![format!("its journal entry ({fault})")]),
    }
}

/// Looks whether every disk runs on its overlay.
fn require_switched(plan: &CreatePlan, machine: &Machine) -> Result<(), StepError> {
    for disk in &plan.disks {
        if !machine.runs_on(&disk.overlay) {
            return Err(StepError::NotSwitched {
                disk: disk.disk.to_string(),
                overlay: disk.overlay.clone(),
            });
        }
    }
    Ok(())
}

/// As [`enter`], once the point is known to be made. What is done already stays as it is, so that recovery
/// can call it too.
pub(crate) fn enter_verified(
    plan: &CreatePlan,
    operation: Operation<'_>,
    made_at: Timestamp,
    point: &Point,
    memory: Option<MemoryRecord>,
    warnings: &mut Vec<Warning>,
) -> Result<SnapshotRecord, StepError> {
    operation.tick("create.verified")?;
    host::fault::point("create.verified")?;
    enter(plan, operation, made_at, point, memory, warnings)
}

/// Seals the frozen layers and enters the snapshot.
pub(crate) fn enter(
    plan: &CreatePlan,
    operation: Operation<'_>,
    made_at: Timestamp,
    point: &Point,
    memory: Option<MemoryRecord>,
    warnings: &mut Vec<Warning>,
) -> Result<SnapshotRecord, StepError> {
    let disks = plan
        .disks
        .iter()
        .map(|disk| LayerRecord {
            sealed_mode: seal_layer(&disk.base, &disk.overlay, warnings),
            fingerprint: fingerprint_of(&disk.base, disk.format),
            key_secret: disk.options.key_secret.clone(),
            ..LayerRecord::new(
                disk.disk.clone(),
                disk.base.clone(),
                disk.format,
                disk.overlay.clone(),
                disk.virtual_size,
            )
        })
        .collect();
    host::fault::point("create.sealed")?;
    let record = SnapshotRecord {
        description: plan.description.clone(),
        labels: plan.labels.clone(),
        consistency: point.consistency,
        freeze: point.freeze.clone(),
        disks,
        memory,
        platform: plan.platform.clone(),
        parent: plan.parent,
        ..SnapshotRecord::new(plan.snapshot, plan.vm.clone(), plan.name.clone(), made_at)
    };
    operation.done(&record)?;
    Ok(record)
}

/// Seals a layer and returns its mode from before. The overlay was made with the base's mode, so it tells
/// that even if an interrupted operation has sealed the base already.
pub(crate) fn seal_layer(base: &Path, overlay: &Path, warnings: &mut Vec<Warning>) -> Option<u32> {
    use std::os::unix::fs::PermissionsExt;

    let sealed = match seal::seal(base) {
        Ok(sealed) => sealed,
        Err(fault) => {
            warnings.push(Warning::NotSealed { path: base.to_owned(), why: fault.to_string() });
            return None;
        }
    };
    let of_overlay = || std::fs::metadata(overlay).ok().map(|meta| meta.permissions().mode() & 0o777);
    sealed.sealed_mode().filter(|mode| mode & 0o222 != 0).or_else(of_overlay)
}

/// What a frozen layer is. One that cannot be read is found by `snapctl check`.
pub(crate) fn fingerprint_of(path: &Path, format: ImageFormat) -> Option<Fingerprint> {
    // The times of a device's node are not its content's.
    if aside::is_device(path) {
        return None;
    }
    let taken = fingerprint::take(path, format);
    taken.inspect_err(|fault| tracing::debug!("no fingerprint of {}: {fault}", path.display())).ok()
}

fn untouched(step: &str, source: StepError) -> Error {
    step_error(step, source, Fate::Untouched)
}

pub(crate) fn step_error(step: &str, source: StepError, fate: Fate) -> Error {
    match source {
        StepError::Signal(signal) => Error::Interrupted { signal, fate },
        source => Error::Step { step: step.to_owned(), source, fate },
    }
}

pub(crate) fn random_bits() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    // `RandomState` is the standard library's door to the system's random bits.
    RandomState::new().build_hasher().finish()
}

/// How long a freeze may hold at most, whatever the user asks for: longer than that is an outage.
pub const MAX_FREEZE_LIMIT: Duration = Duration::from_secs(600);
