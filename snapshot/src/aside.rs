//! Points beside the active layers: each disk is copied by sharing its data, while the guest stands still for a moment.
//!
//! Held by `stop` a guest has nothing under way, and QEMU has flushed every node: what the images hold then is the point.
//! Files are copied by `FICLONE`, thin volumes of LVM by a thin snapshot. The active layer stays what it is, no chain grows,
//! and deleting is a removal. In the catalogue a copy is a layer that leads to the active one ([`LayerRecord::copied`]), so
//! that all that goes by layers works on it.

use std::path::{Path, PathBuf};

use host::files;
use jiff::Timestamp;
use model::{CopyMethod, ImageFormat, LayerRecord, PlannedStep, SnapshotRecord};
use serde::{Deserialize, Serialize};
use storage::overlay::{disk_part, make_durable};
use storage::thin::ThinVolume;
use storage::{Inode, overlay, reflink, seal};
use tokio::sync::Mutex;
use vm::{Operation, PendingOperation, Session, State, pools};

use crate::create::{
    Created, Guards, Interrupt, Warning, fate, find_quiescer_or_warn, fingerprint_of, remember_frozen,
    step_error,
};
use crate::error::{Error, Fate, StepError};
use crate::frozen::{self, Thaw};
use crate::lineage::name_by_history;
use crate::overlays;
use crate::pause::{HELD, Pauser};
use crate::plan::{CreatePlan, CreateRequest, Dice, DiskPlan, Refusal};
use crate::platform;
use crate::point::{self, NoPoint, Point, Switch};
use crate::recover::Recovered;

/// The kind of these operations in the journal.
pub(crate) const KIND: &str = "aside";
/// Ticked off when every copy is made, at the same instant.
const COPIED: &str = "aside.copied";
/// Nothing is frozen or held before this.
const PREPARED: &str = "aside.prepared";

/// Everything that [`create_aside`] will do, decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AsidePlan {
    /// What is the same as for overlays; each disk's `overlay` is its copy.
    #[serde(flatten)]
    pub create: CreatePlan,
    /// How each disk is copied.
    pub methods: Vec<CopyMethod>,
    /// Whether the guest runs, and is to run on.
    pub runs: bool,
}

impl AsidePlan {
    fn copies(&self) -> impl Iterator<Item = (&DiskPlan, CopyMethod)> {
        self.create.disks.iter().zip(self.methods.iter().copied())
    }

    /// The plan for people.
    pub fn steps(&self) -> Vec<PlannedStep> {
        let step = |step: String, undo: Option<&str>| PlannedStep { step, undo: undo.map(str::to_owned) };
        let mut steps = Vec::new();
        if let Some(freeze) = &self.create.freeze {
            steps.push(step(format!("freeze the guest for at most {} s", freeze.limit), Some("thaw")));
        }
        if self.runs {
            steps.push(step("hold the guest".into(), Some("let it go on")));
        }
        for (disk, method) in self.copies() {
            let (from, to, how) = (disk.base.display(), disk.overlay.display(), method.as_str());
            steps
                .push(step(format!("copy {from} to {to} by {how} ({})", disk.disk), Some("remove the copy")));
        }
        if self.runs {
            steps.push(step("let the guest go on".into(), None));
        }
        if self.create.freeze.is_some() {
            steps.push(step("thaw, and wait until it is confirmed".into(), None));
        }
        steps.push(step(format!("enter snapshot {} in the catalogue", self.create.name), None));
        steps
    }
}

/// Decides what [`create_aside`] would do, and touches nothing. `wish` is the one way in which every disk is to be
/// copied; without it each disk's own counts, and that a disk has none is no error but the answer.
///
/// # Errors
/// [`Error::Refused`]; [`Error::Vm`].
pub async fn plan_aside(
    session: &Session,
    state: &State,
    request: &CreateRequest,
    wish: Option<CopyMethod>,
) -> Result<Result<AsidePlan, String>, Error> {
    if request.memory.is_some() {
        return match wish {
            Some(_) => Err(Refusal::AsideMemory.into()),
            None => Ok(Err("the memory is saved with overlays".into())),
        };
    }
    let mut machine = session.observe().await?;
    let known = state.history(None)?;
    name_by_history(&mut machine.disks, &known);
    let platform = session.platform(&machine).await?;
    let mut create = CreatePlan::new(&session.vm, request, &machine, &platform, &known, Dice::roll())?;
    let mut methods = Vec::new();
    for disk in &mut create.disks {
        let why = match Medium::of(disk).map_err(vm::Error::from)? {
            Ok(medium) if wish.is_none_or(|wish| wish == medium.method()) => {
                disk.overlay = medium.copy_path(disk, &create.operation.tag());
                // What was dirty stays so: the active layer is what it was.
                disk.bitmaps.clear();
                if let Medium::Thin(volume) = &medium {
                    pools::require_thin_room(&session.paths, &volume.vg, &volume.pool)?;
                }
                methods.push(medium.method());
                continue;
            }
            Ok(medium) => format!("{} is copied by {}", disk.base.display(), medium.method().as_str()),
            Err(why) => why,
        };
        let Some(method) = wish else { return Ok(Err(why)) };
        let disk = disk.disk.clone();
        return Err(Refusal::NotAside { disk, method: method.as_str(), why }.into());
    }
    Ok(Ok(AsidePlan { create, methods, runs: machine.status.running }))
}

/// What an image lies on, that can copy it by sharing its data.
pub(crate) enum Medium {
    /// A file on a file system with extents that files can share.
    Reflink,
    /// A thin volume of LVM.
    Thin(ThinVolume),
}

impl Medium {
    /// What the disk's active layer lies on; or why it cannot be copied like that.
    fn of(disk: &DiskPlan) -> Result<Result<Self, String>, storage::PoolError> {
        Self::of_path(&disk.base)
    }

    fn of_path(path: &Path) -> Result<Result<Self, String>, storage::PoolError> {
        let shown = path.display();
        if path.is_file() {
            return Ok(match reflink::is_possible(files::parent(path)) {
                Ok(true) => Ok(Self::Reflink),
                Ok(false) => Err(format!("the file system of {shown} cannot share extents between files")),
                // Whether that forbids overlays too is theirs to say; they may lie elsewhere.
                Err(fault) => Err(fault.to_string()),
            });
        }
        let volume = ThinVolume::of(path)?;
        Ok(volume.map(Self::Thin).ok_or_else(|| format!("{shown} is no thin volume of LVM")))
    }

    fn method(&self) -> CopyMethod {
        match self {
            Self::Reflink => CopyMethod::Reflink,
            Self::Thin(_) => CopyMethod::Thin,
        }
    }

    fn copy_path(&self, disk: &DiskPlan, tag: &str) -> PathBuf {
        match self {
            // Its ending tells its format.
            Self::Reflink => disk.overlay.with_extension(disk.format.driver()),
            Self::Thin(volume) => volume.beside(&copy_name(volume, tag)),
        }
    }
}

fn copy_name(volume: &ThinVolume, tag: &str) -> String {
    format!("{}.{tag}", disk_part(&volume.lv))
}

/// Copies that are ready to be made, so that nothing else is done while the guest stands still.
pub(crate) struct Copier<'a> {
    pauser: &'a Pauser<'a>,
    copies: Vec<Copy<'a>>,
}

enum Copy<'a> {
    Reflink { from: &'a Path, to: &'a Path },
    Thin { from: ThinVolume, name: String },
}

impl<'a> Copier<'a> {
    fn new(plan: &'a AsidePlan, pauser: &'a Pauser<'a>) -> Result<Self, StepError> {
        let tag = plan.create.operation.tag();
        let copy = |(disk, method): (&'a DiskPlan, CopyMethod)| match method {
            CopyMethod::Reflink => Ok(Copy::Reflink { from: &disk.base, to: &disk.overlay }),
            CopyMethod::Thin => {
                let from = thin(&disk.base)?;
                Ok(Copy::Thin { name: copy_name(&from, &tag), from })
            }
        };
        let copies: Result<Vec<Copy<'_>>, StepError> = plan.copies().map(copy).collect();
        Ok(Self { pauser, copies: copies? })
    }

    /// Holds the guest, copies, and lets it go on; whatever fails, nothing but copies is there.
    pub async fn make(&self) -> Result<(), NoPoint> {
        let failed = NoPoint::Failed;
        let pause = self.pauser.begin().await.map_err(failed)?;
        let copied = host::fault::point("aside.held").map_err(StepError::from).and_then(|()| self.copy());
        let lasted = pause.as_ref().map(crate::pause::Pause::lasted);
        if let Some(pause) = pause {
            pause.end().await.map_err(failed)?;
        }
        tracing::debug!("the guest stood still for {:?}", lasted.unwrap_or_default());
        copied.map_err(failed)
    }

    fn copy(&self) -> Result<(), StepError> {
        for copy in &self.copies {
            match copy {
                Copy::Reflink { from, to } => reflink::clone_onto(from, to)?,
                Copy::Thin { from, name } => from.copy(name, true).map_err(pool_fault)?,
            }
        }
        Ok(host::fault::point("aside.made")?)
    }
}

fn thin(path: &Path) -> Result<ThinVolume, StepError> {
    let volume = ThinVolume::of(path).map_err(pool_fault)?;
    volume.ok_or_else(|| StepError::OtherFile(path.to_owned()))
}

pub(crate) fn pool_fault(fault: storage::PoolError) -> StepError {
    StepError::State(fault.into())
}

/// Takes a snapshot beside the active layers, as decided by [`plan_aside`].
///
/// Operations that were interrupted earlier have to be settled before, see [`crate::recover`].
///
/// # Errors
/// As [`crate::create()`].
pub async fn create_aside(
    session: &Session,
    state: &State,
    plan: &AsidePlan,
    guards: &Guards,
    interrupt: &Interrupt,
) -> Result<Created, Error> {
    let mut warnings = Vec::new();
    let machine = session.observe().await?;
    let quiescer = match &plan.create.freeze {
        Some(freeze) => find_quiescer_or_warn(session, &machine, freeze, &mut warnings).await?,
        None => None,
    };
    interrupt.check().map_err(|source| step_error("starting", source, Fate::Untouched))?;
    let operation = state.begin(plan.create.operation, &plan.create.vm, KIND, plan)?;
    let mut made = Vec::new();
    if let Err(source) = prepare(plan, &operation, &mut made) {
        return Err(step_error("preparing the copies", source, fate(operation, undo(plan, &made))));
    }
    let turn = Mutex::new(());
    let pauser = Pauser { session, guard: &guards.resume, turn: &turn };
    let step = |name: &str| -> Result<(), StepError> {
        host::fault::point(name)?;
        // The point may be made: from here on no signal takes it back.
        if name == "create.switched" { Ok(()) } else { interrupt.check() }
    };
    let taken = match Copier::new(plan, &pauser) {
        Err(fault) => Err(NoPoint::Failed(fault)),
        Ok(copier) => {
            let switch = Switch::Copies(&copier);
            match (&plan.create.freeze, quiescer) {
                (Some(freeze), Some(quiescer)) => {
                    if freeze.sync_first {
                        point::sync_first(&quiescer, interrupt).await;
                    }
                    point::take_frozen(&switch, freeze, quiescer, &guards.thaw, &mut warnings, &step).await
                }
                _ => point::take(&switch).await,
            }
        }
    };
    let point = match taken {
        Ok(point) => point,
        Err(no_point) => {
            let fault = without_point(plan, operation, &made, no_point);
            remember_frozen(session, state, &fault);
            return Err(fault);
        }
    };
    let finished = finish(plan, operation, Timestamp::now(), &point, &mut warnings);
    let record = finished.map_err(|source| {
        let stands = format!("the copies are made; 'snapctl recover {}' finishes it", plan.create.vm);
        step_error("finishing the snapshot", source, Fate::Interrupted(stands))
    })?;
    match point.frozen_still {
        None => Ok(Created { record, skipped: plan.create.skipped.clone(), reason: None, warnings }),
        Some(source) => {
            let (vm, snapshot) = (plan.create.vm.clone(), Some(record.name));
            let fault = Error::ThawUnconfirmed { vm, source, snapshot, fate: Fate::Untouched };
            remember_frozen(session, state, &fault);
            Err(fault)
        }
    }
}

fn prepare(plan: &AsidePlan, operation: &Operation<'_>, made: &mut Vec<Inode>) -> Result<(), StepError> {
    host::fault::point("aside.begun")?;
    for (disk, method) in plan.copies() {
        made.push(place(&disk.overlay, &disk.base, method)?);
    }
    platform::copy(&plan.create.platform)?;
    operation.note(PREPARED, &made)?;
    Ok(host::fault::point(PREPARED)?)
}

/// After the point: durable, sealed, entered. What is done already stays as it is, so that recovery can call it too.
fn finish(
    plan: &AsidePlan,
    operation: Operation<'_>,
    made_at: Timestamp,
    point: &Point,
    warnings: &mut Vec<Warning>,
) -> Result<SnapshotRecord, StepError> {
    operation.tick(COPIED)?;
    host::fault::point(COPIED)?;
    platform::refresh(&plan.create.platform, warnings)?;
    let mut disks = Vec::new();
    for (disk, method) in plan.copies() {
        let copy = &disk.overlay;
        let mut layer = LayerRecord::new(
            disk.disk.clone(),
            copy.clone(),
            disk.format,
            disk.base.clone(),
            disk.virtual_size,
        );
        layer.copied = Some(method);
        layer.key_secret.clone_from(&disk.options.key_secret);
        if method == CopyMethod::Reflink {
            verify(disk)?;
            make_durable(copy)?;
            match seal::seal(copy) {
                Ok(sealed) => layer.sealed_mode = sealed.sealed_mode(),
                Err(fault) => {
                    warnings.push(Warning::NotSealed { path: copy.clone(), why: fault.to_string() });
                }
            }
            layer.fingerprint = fingerprint_of(copy, disk.format);
        } else if !copy.exists() {
            return Err(StepError::OtherFile(copy.clone()));
        }
        disks.push(layer);
    }
    host::fault::point("aside.sealed")?;
    let create = &plan.create;
    let record = SnapshotRecord {
        description: create.description.clone(),
        labels: create.labels.clone(),
        consistency: point.consistency,
        freeze: point.freeze.clone(),
        disks,
        platform: create.platform.clone(),
        parent: create.parent,
        ..SnapshotRecord::new(create.snapshot, create.vm.clone(), create.name.clone(), made_at)
    };
    operation.done(&record)?;
    host::fault::point("aside.recorded")?;
    Ok(record)
}

/// Reads back what was copied.
fn verify(disk: &DiskPlan) -> Result<(), StepError> {
    if disk.format == ImageFormat::Raw {
        return Ok(());
    }
    let header = storage::qcow2::Header::open(&disk.overlay).map_err(StepError::Header)?;
    match header.virtual_size == disk.virtual_size {
        true => Ok(()),
        false => Err(StepError::OtherFile(disk.overlay.clone())),
    }
}

/// Removes the copies that there are. Returns what could not be removed.
fn undo(plan: &AsidePlan, made: &[Inode]) -> Vec<String> {
    let mut left = overlays::remove_noted_or_empty(&plan.create.disks, made);
    left.extend(platform::remove(&plan.create.platform));
    left
}

/// Makes the empty file that a copy goes into, with the owner and mode of `like`; a volume is made with its data.
pub(crate) fn place(path: &Path, like: &Path, method: CopyMethod) -> Result<Inode, StepError> {
    match method {
        CopyMethod::Reflink => Ok(overlay::prepare(path, like)?.inode),
        CopyMethod::Thin => Ok(Inode { dev: 0, ino: 0 }),
    }
}

/// Whether a layer is a device, which is not removed as files are.
pub(crate) fn is_device(path: &Path) -> bool {
    path.starts_with("/dev")
}

/// Whether it is a thin volume; one of which it cannot be told is none.
pub(crate) fn is_thin(path: &Path) -> bool {
    ThinVolume::of(path).is_ok_and(|volume| volume.is_some())
}

/// Removes a thin volume that snapctl has made. One that is gone is no fault, and one that somebody else made stays.
pub(crate) fn remove_device(path: &Path) -> Result<(), StepError> {
    let Some(volume) = ThinVolume::of(path).map_err(pool_fault)?.filter(|_| path.exists()) else {
        return Ok(());
    };
    match volume.remove() {
        Err(fault @ storage::PoolError::Foreign { .. }) => {
            tracing::warn!("{fault}, and stays");
            Ok(())
        }
        removed => removed.map_err(pool_fault),
    }
}

/// Makes a layer of its own of a copy, for a disk to go on in: as the copy is, and written to. [`place`] was called.
pub(crate) fn renew(from: &Path, to: &Path, method: CopyMethod, tag: &str) -> Result<(), StepError> {
    match method {
        CopyMethod::Reflink => {
            reflink::clone_onto(from, to)?;
            Ok(make_durable(to)?)
        }
        CopyMethod::Thin => {
            let volume = thin(from)?;
            volume.copy(&copy_name(&volume, tag), false).map_err(pool_fault)
        }
    }
}

/// Where the layer goes that [`renew`] makes; `overlay` is where an overlay would go.
pub(crate) fn renewed_path(
    from: &Path,
    overlay: &Path,
    format: ImageFormat,
    method: CopyMethod,
    tag: &str,
) -> Result<PathBuf, StepError> {
    Ok(match method {
        CopyMethod::Reflink => overlay.with_extension(format.driver()),
        CopyMethod::Thin => {
            let volume = thin(from)?;
            volume.beside(&copy_name(&volume, tag))
        }
    })
}

fn without_point(plan: &AsidePlan, operation: Operation<'_>, made: &[Inode], no_point: NoPoint) -> Error {
    let vm = plan.create.vm.clone();
    let fate = fate(operation, undo(plan, made));
    match no_point {
        NoPoint::NotQuiesced(reason) => Error::NotQuiesced { vm, reason, fate },
        NoPoint::FrozenStill(source @ agent_client::GuardError::Gone) => {
            step_error("freezing", source.into(), fate)
        }
        NoPoint::FrozenStill(source) => Error::ThawUnconfirmed { vm, source, snapshot: None, fate },
        NoPoint::Failed(source) | NoPoint::Unknown(source, None) => {
            step_error("taking the snapshot", source, fate)
        }
        NoPoint::Unknown(_, Some(source)) => Error::ThawUnconfirmed { vm, source, snapshot: None, fate },
    }
}

/// Settles an operation of this kind that was interrupted: finished if every copy was seen, undone otherwise.
///
/// # Errors
/// The journal knows of it still, and this can be tried again.
pub(crate) async fn settle_pending(
    session: Option<&Session>,
    pending: &PendingOperation,
    state: &State,
) -> Result<Recovered, StepError> {
    let plan: AsidePlan = pending.plan()?;
    if let Some(session) = session.filter(|_| pending.step != "begun") {
        let machine = session.observe().await?;
        if plan.runs && HELD.contains(&machine.status.status.as_str()) {
            session.qmp.execute(&agent_client::Cont {}).await?;
        }
        if plan.create.freeze.is_some() {
            let thawed = frozen::thaw(session, &machine.chardevs, Some(session.timeout)).await;
            if let Thaw::NoAgent { .. } = thawed.map_err(StepError::NotThawed)? {
                frozen::remember(session, state)?;
            }
        }
    }
    let operation = state.resume(pending.id)?;
    if pending.step == COPIED {
        let mut warnings = Vec::new();
        let snapshot = finish(&plan, operation, pending.started, &Point::crash(), &mut warnings)?;
        crate::recover::tell(&warnings);
        return Ok(Recovered::Finished { snapshot: Box::new(snapshot) });
    }
    let made = if pending.step == "begun" { None } else { pending.notes::<Vec<Inode>>()? };
    let left = undo(&plan, &made.unwrap_or_default());
    if !left.is_empty() {
        return Err(StepError::LeftBehind(left));
    }
    operation.undone()?;
    Ok(Recovered::Undone { name: plan.create.name })
}
