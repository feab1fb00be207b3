//! The memory of a VM at a point in time: what QEMU's migration writes, into a file beside the disks.
//!
//! **Live**: the guest is held, every disk switches, and QEMU writes the memory while the guest runs on: a page that the
//! guest is about to change is saved before. **Stop**: the guest is held, all of its memory is written, every disk switches
//! while the migration waits before its last part, and the guest goes on.
//!
//! QEMU writes to the file itself, so that it does not depend on snapctl's life; the file is compressed when the guest runs
//! again. Source: QEMU docs/devel/migration/, qapi/migration.json.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_client::{
    CloseFd, Cont, Migrate, MigrateCancel, MigrateContinue, MigrateSetCapabilities, MigrateSetParameters,
    MigrationCapability, MigrationInfo, Qmp, QomGet, QomList, QueryFdsets, QueryMemorySizeSummary,
    QueryMigrate, QueryMigrateCapabilities, QueryMigrateParameters, QueryStatus, RemoveFd,
};
use host::Error as HostError;
use host::files;
use jiff::Timestamp;
use model::{ByteSize, DeviceRecord, MemoryLayout, MemoryMethod, MemoryRecord};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use storage::compress::compress;
use storage::overlay;
use storage::publish::partial;
use storage::space::{self, SpaceError};
use vm::{Machine, Session};

use crate::create::{Interrupt, Warning};
use crate::error::StepError;
use crate::jobs::tell;
use crate::pause::{HELD, Pause, Pauser};
use crate::plan::{CreatePlan, Refusal};
use crate::point::{NoPoint, Point, Switch, take};

/// From this QEMU on a guest survives that its memory cannot be written to the end; and pages can have their places in a file.
/// Seen: broken off, 7.2.22 leaves a guest that runs and does not answer, 10.0.2 does not.
const LIVE_SINCE: u32 = 9;
/// Capabilities of QEMU's migration.
const BACKGROUND: &str = "background-snapshot";
const MAPPED: &str = "mapped-ram";
const WAITS: &str = "pause-before-switchover";
/// Ticked off when the raw file is whole.
pub(crate) const SAVED: &str = "create.saved";
/// MigrationStatus in which a migration waits for `migrate-continue`.
const WAITING: &str = "pre-switchover";
const COMPLETED: &str = "completed";
/// Bytes a second: no limit.
const UNLIMITED: u64 = 1 << 50;
/// Device state and headers take no more than this, beside the memory itself.
const DEVICES_ROOM: u64 = 64 << 20;
const POLL: Duration = Duration::from_millis(2);
/// Where the guest runs on meanwhile, nothing is in a hurry.
const LIVE_POLL: Duration = Duration::from_millis(20);
const FD_NAME: &str = "snapctl-memory";

/// What the user wants of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryWish {
    /// Save it live where that can be had, otherwise while the guest stands still.
    Best,
    /// Save it in this way, or take nothing.
    Only(MemoryMethod),
}

/// How the memory is saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// What QEMU writes.
    pub raw: PathBuf,
    /// The same, compressed.
    pub path: PathBuf,
    /// How.
    pub method: MemoryMethod,
    /// Why it is not saved live, if it is not and that was not asked for.
    pub reason: Option<String>,
    /// How the bytes lie in the file.
    pub layout: MemoryLayout,
    /// The guest's memory.
    pub ram: ByteSize,
    /// How migrations were set before, and are again afterwards.
    pub before: Settings,
    /// What it takes to load it.
    pub qemu: String,
    /// See [`MemoryRecord::machine`].
    pub machine: String,
    /// See [`MemoryRecord::devices`].
    pub devices: Vec<DeviceRecord>,
}

/// How migrations are set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Capabilities that are on.
    pub on: Vec<String>,
    /// Bytes a second.
    pub max_bandwidth: u64,
}

/// Memory that was saved with a point, or why it was not though the point was made.
#[derive(Debug)]
pub(crate) enum Memory {
    /// It is in the raw file; and for how many seconds the guest stood still, if that was seen.
    Saved {
        pause: Option<f64>,
    },
    Lost(String),
}

/// Decides how memory is saved. Nothing is changed that lasts.
pub(crate) async fn plan(
    session: &Session,
    plan: &CreatePlan,
    wish: MemoryWish,
) -> Result<MemoryPlan, crate::Error> {
    let asked = ask(session, plan, wish).await;
    asked.map_err(|fault| match fault {
        Fault::Refused(refusal) => refusal.into(),
        Fault::Asked(fault) => vm::Error::conversation(&session.vm)(fault).into(),
    })
}

enum Fault {
    Refused(Refusal),
    Asked(agent_client::Error),
}

impl From<agent_client::Error> for Fault {
    fn from(fault: agent_client::Error) -> Self {
        Self::Asked(fault)
    }
}

async fn ask(session: &Session, plan: &CreatePlan, wish: MemoryWish) -> Result<MemoryPlan, Fault> {
    let qmp = &session.qmp;
    let capabilities = qmp.execute(&QueryMigrateCapabilities {}).await?;
    let before = Settings {
        on: capabilities.iter().filter(|known| known.state).map(|known| known.capability.clone()).collect(),
        max_bandwidth: qmp.execute(&QueryMigrateParameters {}).await?.max_bandwidth,
    };
    let no_live = why_not_live(qmp, &capabilities, &before).await?;
    let (method, reason) = match (wish, no_live) {
        (MemoryWish::Only(MemoryMethod::Live), Some(why)) => {
            return Err(Fault::Refused(Refusal::NoLiveMemory { vm: session.vm.clone(), why }));
        }
        (MemoryWish::Only(method), _) => (method, None),
        (MemoryWish::Best, None) => (MemoryMethod::Live, None),
        (MemoryWish::Best, why) => (MemoryMethod::Stop, why),
    };
    // Both together are accepted by 10.0.2, and what they write loads as zeroes.
    let mapped = method == MemoryMethod::Stop && knows(&capabilities, MAPPED);
    let stem = plan.disks.first().map(|disk| disk.overlay.with_extension("")).unwrap_or_default();
    Ok(MemoryPlan {
        raw: files::append(&stem, ".memory"),
        path: files::append(&stem, ".memory.zst"),
        method,
        reason,
        layout: if mapped { MemoryLayout::MappedRam } else { MemoryLayout::Stream },
        ram: ram(qmp).await?,
        before,
        qemu: qmp.version().qemu.to_string(),
        machine: machine(qmp).await?,
        devices: devices(qmp).await?,
    })
}

/// The guest's memory.
pub(crate) async fn ram(qmp: &Qmp) -> Result<ByteSize, agent_client::Error> {
    let size = qmp.execute(&QueryMemorySizeSummary {}).await?;
    Ok(ByteSize(size.base_memory.saturating_add(size.plugged_memory)))
}

/// Makes sure that so much memory has room in `dir`, with the state of the devices.
pub(crate) fn require_room(dir: &Path, ram: ByteSize) -> Result<(), SpaceError> {
    // A page is written with a header of 8 bytes.
    let needed = ram.0.saturating_add(ram.0 / 256).saturating_add(DEVICES_ROOM);
    space::require(dir, ByteSize(needed)).map(drop)
}

fn knows(capabilities: &[MigrationCapability], name: &str) -> bool {
    capabilities.iter().any(|known| known.capability == name)
}

/// Why memory cannot be saved while the guest runs on, if it cannot. QEMU tells when it is asked to be ready for it.
async fn why_not_live(
    qmp: &Qmp,
    capabilities: &[MigrationCapability],
    before: &Settings,
) -> Result<Option<String>, agent_client::Error> {
    let version = qmp.version().qemu;
    if version.major < LIVE_SINCE {
        return Ok(Some(format!(
            "on QEMU {version} a guest hangs if its memory cannot be written to the end; {LIVE_SINCE}.0 or later is needed"
        )));
    }
    if !knows(capabilities, BACKGROUND) {
        return Ok(Some(format!("this QEMU has no {BACKGROUND}")));
    }
    let refused = match set(qmp, &only(capabilities, &[BACKGROUND])).await {
        Ok(()) => None,
        Err(fault) if fault.is_refusal() => Some(fault.to_string()),
        Err(fault) => return Err(fault),
    };
    put_back(qmp, before).await?;
    Ok(refused)
}

/// `wanted` on, and what else is known and on, off.
fn only(capabilities: &[MigrationCapability], wanted: &[&str]) -> Vec<MigrationCapability> {
    let is_wanted = |known: &MigrationCapability| wanted.contains(&known.capability.as_str());
    let changed = capabilities.iter().filter(|known| known.state != is_wanted(known));
    changed.map(|known| MigrationCapability { state: is_wanted(known), ..known.clone() }).collect()
}

async fn set(qmp: &Qmp, capabilities: &[MigrationCapability]) -> Result<(), agent_client::Error> {
    let capabilities = capabilities.to_vec();
    qmp.execute(&MigrateSetCapabilities { capabilities }).await.map(drop)
}

async fn put_back(qmp: &Qmp, before: &Settings) -> Result<(), agent_client::Error> {
    let now = qmp.execute(&QueryMigrateCapabilities {}).await?;
    let wanted: Vec<&str> = before.on.iter().map(String::as_str).collect();
    set(qmp, &only(&now, &wanted)).await?;
    qmp.execute(&MigrateSetParameters { max_bandwidth: before.max_bandwidth }).await.map(drop)
}

/// Leaves QEMU as it was: how migrations are set, and without the file, whose room is not free as long as it is open.
async fn leave(qmp: &Qmp, memory: &MemoryPlan) -> Result<(), agent_client::Error> {
    let mark = mark(&memory.raw);
    for set in qmp.execute(&QueryFdsets {}).await? {
        if set.fds.iter().any(|fd| fd.opaque.as_deref() == Some(&mark)) {
            qmp.execute(&RemoveFd { fdset_id: set.fdset_id }).await?;
        }
    }
    // One that a migration has taken is not there any more.
    match qmp.execute(&CloseFd { fdname: FD_NAME.into() }).await {
        Err(fault) if !fault.is_refusal() => return Err(fault),
        _ => {}
    }
    put_back(qmp, &memory.before).await
}

/// By what a descriptor of ours is known in QEMU.
fn mark(raw: &Path) -> String {
    raw.display().to_string()
}

async fn machine(qmp: &Qmp) -> Result<String, agent_client::Error> {
    let kind = qmp.execute(&QomGet { path: "/machine".into(), property: "type".into() }).await?;
    let kind = kind.as_str().unwrap_or_default();
    Ok(kind.strip_suffix("-machine").unwrap_or(kind).to_owned())
}

async fn devices(qmp: &Qmp) -> Result<Vec<DeviceRecord>, agent_client::Error> {
    let listed = qmp.execute(&QomList { path: "/machine/peripheral".into() }).await?;
    let device = |property: agent_client::ObjectProperty| {
        let driver = property.kind.strip_prefix("child<")?.strip_suffix('>')?.to_owned();
        Some(DeviceRecord { id: property.name, driver })
    };
    Ok(listed.into_iter().filter_map(device).collect())
}

/// Makes sure that there is room, and makes the empty file with the owner and mode of the first disk.
pub(crate) fn make_file(plan: &CreatePlan, memory: &MemoryPlan) -> Result<(), StepError> {
    require_room(files::parent(&memory.raw), memory.ram)?;
    if let Some(disk) = plan.disks.first() {
        overlay::prepare(&memory.raw, &disk.base)?;
    }
    Ok(())
}

/// Removes what was made of it; the names are this operation's alone.
pub(crate) fn remove_files(memory: &MemoryPlan) -> Vec<String> {
    let files = [memory.raw.clone(), partial(&memory.path), memory.path.clone()];
    let failed = files.iter().filter_map(|path| files::remove_durably(path).err());
    failed.map(|fault| fault.to_string()).collect()
}

/// Makes the point with the memory of the same instant. `step` is called at every boundary before the point.
pub(crate) async fn take_with(
    plan: &CreatePlan,
    memory: &MemoryPlan,
    pauser: &Pauser<'_>,
    interrupt: &Interrupt,
    step: &dyn Fn(&str) -> Result<(), StepError>,
) -> Result<Point, NoPoint> {
    let saving = Saving { qmp: &pauser.session.qmp, plan, memory, interrupt };
    let taken = match memory.method {
        MemoryMethod::Live => saving.live(pauser, step).await,
        MemoryMethod::Stop => saving.stopped(pauser, step).await,
    };
    if let Err(fault) = leave(saving.qmp, memory).await {
        tracing::warn!("how migrations are set could not be put back: {fault}");
    }
    taken
}

struct Saving<'a> {
    qmp: &'a Qmp,
    plan: &'a CreatePlan,
    memory: &'a MemoryPlan,
    interrupt: &'a Interrupt,
}

impl Saving<'_> {
    async fn live(
        &self,
        pauser: &Pauser<'_>,
        step: &dyn Fn(&str) -> Result<(), StepError>,
    ) -> Result<Point, NoPoint> {
        let (migrate, pause) = self.hold(pauser, &[BACKGROUND], step).await?;
        let (mut point, pause) = self.switch(pause).await?;
        let tracked = match tell(self.qmp, &migrate).await {
            Ok(()) => self.wait(POLL, |info| info.ram.normal + info.ram.duplicate > 0).await,
            Err(fault) => Err(fault),
        };
        // Whatever became of the memory: the point is made, and the guest goes on.
        let lasted = end(pause).await.map_err(unknown)?;
        host::fault::point("create.saving").map_err(|fault| unknown(fault.into()))?;
        let saved = match tracked {
            Ok(_) => self.wait(LIVE_POLL, |_| false).await,
            Err(fault) => Err(fault),
        };
        point.memory = Some(judge(saved, lasted));
        Ok(point)
    }

    async fn stopped(
        &self,
        pauser: &Pauser<'_>,
        step: &dyn Fn(&str) -> Result<(), StepError>,
    ) -> Result<Point, NoPoint> {
        let mapped = self.memory.layout == MemoryLayout::MappedRam;
        let wanted: &[&str] = if mapped { &[WAITS, MAPPED] } else { &[WAITS] };
        let (migrate, pause) = self.hold(pauser, wanted, step).await?;
        if let Err(fault) = self.until_waiting(&migrate, step).await {
            return Err(self.let_go(pause, fault).await);
        }
        let (mut point, pause) = self.switch(pause).await?;
        let saved = self.go_on().await;
        let lasted = end(pause).await.map_err(unknown)?;
        point.memory = Some(judge(saved, lasted));
        Ok(point)
    }

    /// Holds the guest, once all is ready that can be before.
    async fn hold<'p>(
        &self,
        pauser: &Pauser<'p>,
        wanted: &[&str],
        step: &dyn Fn(&str) -> Result<(), StepError>,
    ) -> Result<(Migrate, Option<Pause<'p>>), NoPoint> {
        let migrate = self.get_ready(wanted).await.map_err(NoPoint::Failed)?;
        let pause = pauser.begin().await.map_err(NoPoint::Failed)?;
        match step("create.held") {
            Ok(()) => Ok((migrate, pause)),
            Err(fault) => Err(self.let_go(pause, fault).await),
        }
    }

    async fn get_ready(&self, wanted: &[&str]) -> Result<Migrate, StepError> {
        let capabilities = self.qmp.execute(&QueryMigrateCapabilities {}).await?;
        set(self.qmp, &only(&capabilities, wanted)).await?;
        tell(self.qmp, &MigrateSetParameters { max_bandwidth: UNLIMITED }).await?;
        Ok(Migrate { uri: hand_over(self.qmp, &self.memory.raw).await? })
    }

    /// Lets every disk switch; if none does, the guest goes on as if nothing had been.
    async fn switch<'p>(&self, pause: Option<Pause<'p>>) -> Result<(Point, Option<Pause<'p>>), NoPoint> {
        match take(&Switch::Overlays { qmp: self.qmp, plan: self.plan }).await {
            Ok(point) => {
                host::fault::point("create.switched").map_err(|fault| unknown(fault.into()))?;
                Ok((Point { made_at: Some(Timestamp::now()), ..point }, pause))
            }
            Err(no_point) => {
                let _ = cancel(self.qmp).await;
                let _ = end(pause).await;
                Err(no_point)
            }
        }
    }

    /// Writes the memory, until only the device state is left.
    async fn until_waiting(
        &self,
        migrate: &Migrate,
        step: &dyn Fn(&str) -> Result<(), StepError>,
    ) -> Result<(), StepError> {
        tell(self.qmp, migrate).await?;
        let info = self.wait(POLL, |info| info.status.as_deref() == Some(WAITING)).await?;
        match info.status.as_deref() {
            Some(WAITING) => step("create.saving"),
            _ => Err(StepError::Memory("it ended before its last part".into())),
        }
    }

    async fn go_on(&self) -> Result<MigrationInfo, StepError> {
        tell(self.qmp, &MigrateContinue { state: WAITING.into() }).await?;
        self.wait(POLL, |_| false).await
    }

    /// Waits until the migration is completed, or `until` says that it is far enough.
    async fn wait(
        &self,
        poll: Duration,
        until: impl Fn(&MigrationInfo) -> bool,
    ) -> Result<MigrationInfo, StepError> {
        loop {
            let info = self.qmp.execute(&QueryMigrate {}).await?;
            if !info.is_active() {
                return ended(info);
            }
            if until(&info) {
                return Ok(info);
            }
            if self.interrupt.raised().is_some() {
                cancel(self.qmp).await?;
                self.interrupt.check()?;
            }
            tokio::time::sleep(poll).await;
        }
    }

    /// Nothing was made: the guest goes on as if nothing had been.
    async fn let_go(&self, pause: Option<Pause<'_>>, fault: StepError) -> NoPoint {
        let cancelled = cancel(self.qmp).await;
        let ended = end(pause).await;
        NoPoint::Failed(cancelled.err().or(ended.err()).unwrap_or(fault))
    }
}

/// From the point on, what failed leaves open what stands.
fn unknown(fault: StepError) -> NoPoint {
    NoPoint::Unknown(fault, None)
}

/// Lets the guest go on, and tells for how long it was held.
async fn end(pause: Option<Pause<'_>>) -> Result<Duration, StepError> {
    let Some(pause) = pause else { return Ok(Duration::ZERO) };
    let lasted = pause.lasted();
    pause.end().await.map(|()| lasted)
}

fn ended(info: MigrationInfo) -> Result<MigrationInfo, StepError> {
    match info.status.as_deref() {
        Some(COMPLETED) => Ok(info),
        status => {
            let why = info.error.unwrap_or_else(|| format!("it is {}", status.unwrap_or("not begun")));
            Err(StepError::Memory(agent_client::printable(&why, 300)))
        }
    }
}

fn judge(saved: Result<MigrationInfo, StepError>, lasted: Duration) -> Memory {
    match saved {
        Ok(_) => Memory::Saved { pause: Some(lasted.as_secs_f64()) },
        Err(fault) => Memory::Lost(fault.to_string()),
    }
}

/// Gives QEMU the file to write to, and returns its name there. QEMU needs no right to open it.
async fn hand_over(qmp: &Qmp, path: &Path) -> Result<String, StepError> {
    let file = File::options().write(true).open(path).map_err(HostError::io("open", path))?;
    let fds = vec![OwnedFd::from(file)];
    if qmp.version().qemu.major < LIVE_SINCE {
        qmp.execute_with_fds("getfd", json!({ "fdname": FD_NAME }), fds).await?;
        return Ok(format!("fd:{FD_NAME}"));
    }
    let added = qmp.execute_with_fds("add-fd", json!({ "opaque": mark(path) }), fds).await?;
    let added: Value = agent_client::decode("add-fd", &added)?;
    Ok(format!("file:/dev/fdset/{}", added["fdset-id"]))
}

/// Breaks a migration off, and waits until it has ended.
async fn cancel(qmp: &Qmp) -> Result<(), StepError> {
    if qmp.execute(&QueryMigrate {}).await?.is_active() {
        tell(qmp, &MigrateCancel {}).await?;
    }
    while qmp.execute(&QueryMigrate {}).await?.is_active() {
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Compresses what was saved, and makes the record of it. What a killed one did already stays as it is.
///
/// # Errors
/// The raw file stays.
fn keep(memory: &MemoryPlan, pause: Option<f64>) -> Result<MemoryRecord, StepError> {
    let size = match std::fs::metadata(&memory.path) {
        Ok(done) => {
            files::remove_durably(&memory.raw)?;
            ByteSize(done.len())
        }
        Err(_) => compress(&memory.raw, &memory.path)?,
    };
    host::fault::point("create.compressed")?;
    Ok(MemoryRecord {
        path: memory.path.clone(),
        size,
        ram: memory.ram,
        method: memory.method,
        layout: memory.layout,
        pause,
        qemu: memory.qemu.clone(),
        machine: memory.machine.clone(),
        devices: memory.devices.clone(),
    })
}

/// Keeps the memory with a point that was made, or tells why there is none.
pub(crate) async fn keep_or_tell(
    plan: &CreatePlan,
    saved: Option<&Memory>,
    warnings: &mut Vec<Warning>,
) -> Result<Option<MemoryRecord>, StepError> {
    match (&plan.memory, saved) {
        (Some(memory), Some(Memory::Saved { pause })) => {
            let (memory, pause) = (memory.clone(), *pause);
            let kept = tokio::task::spawn_blocking(move || keep(&memory, pause)).await;
            kept.unwrap_or_else(|fault| Err(StepError::Memory(fault.to_string()))).map(Some)
        }
        (Some(memory), Some(Memory::Lost(why))) => {
            warnings.push(Warning::MemoryLost { why: why.clone() });
            warnings.extend(remove_files(memory).into_iter().map(|why| Warning::MemoryLost { why }));
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// What became of the memory of an interrupted operation, on a VM that still runs. `switched`: the point is made.
///
/// The guest goes on after this, if the operation was what held it.
pub(crate) async fn settle(
    qmp: &Qmp,
    machine: &Machine,
    memory: &MemoryPlan,
    switched: bool,
) -> Result<Memory, StepError> {
    // A migration that does not write to the file is another's.
    let is_ours = machine.has_open(&memory.raw) == Some(true) || is_written(memory);
    let mut info = qmp.execute(&QueryMigrate {}).await?;
    if is_ours && !switched {
        cancel(qmp).await?;
    } else if is_ours && info.status.as_deref() == Some(WAITING) {
        tell(qmp, &MigrateContinue { state: WAITING.into() }).await?;
    }
    while is_ours && info.is_active() {
        tokio::time::sleep(LIVE_POLL).await;
        info = qmp.execute(&QueryMigrate {}).await?;
    }
    if !info.is_active() {
        leave(qmp, memory).await?;
    }
    if !is_ours {
        return Ok(Memory::Lost("it was not begun".into()));
    }
    let status = qmp.execute(&QueryStatus {}).await?;
    if HELD.contains(&status.status.as_str()) {
        tell(qmp, &Cont {}).await?;
    }
    Ok(match ended(info) {
        Ok(_) => Memory::Saved { pause: None },
        Err(fault) => Memory::Lost(fault.to_string()),
    })
}

/// As [`settle`], where that QEMU is gone: only what was compressed is surely whole.
pub(crate) fn settle_stopped(memory: &MemoryPlan, is_saved: bool) -> Memory {
    match memory.path.exists() || (is_saved && is_written(memory)) {
        true => Memory::Saved { pause: None },
        false => Memory::Lost("the VM ended before it was written".into()),
    }
}

fn is_written(memory: &MemoryPlan) -> bool {
    memory.path.exists() || std::fs::metadata(&memory.raw).is_ok_and(|raw| raw.len() > 0)
}
