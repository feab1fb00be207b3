//! The plan of a snapshot: a pure value, made of what was asked and what was observed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use model::{
    ByteSize, DiskName, History, ImageFormat, MAX_LABELS, MemoryMethod, Name, OperationId, PlannedStep,
    PlatformFile, Quiesce, SnapshotId,
};
use serde::{Deserialize, Serialize};
use storage::chain::ChainError;
use storage::overlay::overlay_paths;
use storage::space::SpaceError;
use vm::Machine;
use vm::disks::{ActiveLayer, Content, Disk, NodeOptions, select};
use vm::platform::Platform;

use crate::aside;
use crate::bitmaps::{self, BitmapPlan};
use crate::create::random_bits;
use crate::lineage::went_on_in;
use crate::memory::{MemoryPlan, MemoryWish};
use crate::platform;

/// How long a freeze may hold unless the user says otherwise: as long as Windows' VSS allows.
pub const DEFAULT_MAX_FREEZE: Duration = Duration::from_secs(10);
/// Longest chain. `query-block` describes each layer inside the one above, and a reply that is nested more than 128
/// levels deep is not read: on a longer chain nobody could look at the VM any more.
const MAX_CHAIN: usize = 96;

/// What the user asks for.
#[derive(Clone, Debug)]
pub struct CreateRequest {
    /// The snapshot's name; one is made of the time if none is given.
    pub name: Option<Name>,
    /// What the user wrote about it.
    pub description: Option<String>,
    /// The user's marks on it.
    pub labels: BTreeMap<String, String>,
    /// Whether the guest's file systems are frozen.
    pub quiesce: Quiesce,
    /// Mount points to freeze; all file systems if empty.
    pub mountpoints: Vec<String>,
    /// Disks to take, by any of their names; all if empty.
    pub disks: Vec<String>,
    /// How long the freeze may hold.
    pub max_freeze: Duration,
    /// Whether the guest is asked to write its dirty pages out before the freeze.
    pub sync_first: bool,
    /// Whether the memory is saved too.
    pub memory: Option<MemoryWish>,
    /// Where overlays of disks on block devices go.
    pub overlay_dir: Option<PathBuf>,
}

/// Everything that [`crate::create`] will do, decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CreatePlan {
    /// The operation's id, part of every name that it makes.
    pub operation: OperationId,
    /// The snapshot's id.
    pub snapshot: SnapshotId,
    /// The VM.
    pub vm: Name,
    /// The snapshot's name.
    pub name: Name,
    /// What the user wrote about it.
    pub description: Option<String>,
    /// The user's marks on it.
    pub labels: BTreeMap<String, String>,
    /// The freeze, if there is to be one.
    pub freeze: Option<FreezePlan>,
    /// How the memory is saved, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryPlan>,
    /// Firmware variables and TPM state, which are copied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub platform: Vec<PlatformFile>,
    /// The disks, in QEMU's order.
    pub disks: Vec<DiskPlan>,
    /// Drives that are left out, and why.
    pub skipped: Vec<SkippedDisk>,
    /// The snapshot before this one.
    pub parent: Option<SnapshotId>,
}

/// How the guest is to be frozen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FreezePlan {
    /// Whether nothing is taken if the guest cannot be frozen.
    pub required: bool,
    /// Mount points; all file systems if empty.
    pub mountpoints: Vec<String>,
    /// Seconds that the freeze may hold.
    pub limit: f64,
    /// Whether the guest writes its dirty pages out first.
    pub sync_first: bool,
}

/// What is done to one disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskPlan {
    /// The disk.
    pub disk: DiskName,
    /// Its format node now.
    pub node: String,
    /// Its active layer now.
    pub base: PathBuf,
    /// The format of `base`.
    pub format: ImageFormat,
    /// What the guest sees.
    pub virtual_size: ByteSize,
    /// What the user chose for the base, and the overlay has too.
    pub options: NodeOptions,
    /// Dirty bitmaps that move from the base to the overlay.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<BitmapPlan>,
    /// How QEMU is to open what the overlay stands on, where the headers do not tell all: encrypted layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<serde_json::Value>,
    /// The overlay that becomes the active layer.
    pub overlay: PathBuf,
    /// The overlay's format node.
    pub overlay_node: String,
    /// The overlay's protocol node.
    pub file_node: String,
}

/// A drive that the snapshot leaves out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedDisk {
    /// The drive.
    pub disk: DiskName,
    /// Why.
    pub reason: String,
}

/// Why there is no plan. Nothing was touched.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The name is in use.
    #[error("{vm} has a snapshot named {name} already")]
    NameTaken {
        /// The VM.
        vm: Name,
        /// The name.
        name: Name,
    },
    /// Too many labels.
    #[error("{0} labels are too many; {MAX_LABELS} are allowed")]
    TooManyLabels(usize),
    /// The user names a disk that there is not, or the same one twice.
    #[error(transparent)]
    Disk(#[from] vm::Error),
    /// The VM has no disk that a snapshot could hold.
    #[error("{vm} has no disk to snapshot: {}", list(skipped))]
    NoDisk {
        /// The VM.
        vm: Name,
        /// Its drives, and why each is left out.
        skipped: Vec<SkippedDisk>,
    },
    /// The user names a disk that is left out of snapshots.
    #[error("disk {disk} of {vm} is not part of snapshots: {reason}")]
    DiskSkipped {
        /// The VM.
        vm: Name,
        /// The disk.
        disk: DiskName,
        /// Why.
        reason: String,
    },
    /// A disk cannot be snapshotted.
    #[error("disk {disk} of {vm} cannot be snapshotted: {reason}")]
    DiskUnfit {
        /// The VM.
        vm: Name,
        /// The disk.
        disk: DiskName,
        /// Why.
        reason: String,
        /// Disks that can.
        others: Vec<DiskName>,
    },
    /// A job works on a disk.
    #[error("the block job {job} works on disk {disk} of {vm}")]
    JobActive {
        /// The VM.
        vm: Name,
        /// The disk.
        disk: DiskName,
        /// The job.
        job: String,
    },
    /// A backup works with a dirty bitmap of a disk.
    #[error("the dirty bitmap {bitmap} of disk {disk} of {vm} is in use")]
    BitmapBusy {
        /// The VM.
        vm: Name,
        /// The disk.
        disk: DiskName,
        /// The bitmap.
        bitmap: String,
    },
    /// The VM is being migrated.
    #[error("{vm} is being migrated (status {status})")]
    MigrationActive {
        /// The VM.
        vm: Name,
        /// QEMU's word for it.
        status: String,
    },
    /// QEMU runs on a layer that has children: somebody started it with an old path.
    #[error("{vm} was started on {}, which is a frozen layer: snapshot {snapshot} holds it, and disk {disk} went on in {}", layer.display(), active.display())]
    StaleLayer {
        /// The VM.
        vm: Name,
        /// The disk.
        disk: DiskName,
        /// The layer that QEMU has open for writing.
        layer: PathBuf,
        /// The snapshot whose data is at stake.
        snapshot: Name,
        /// The layer that it should run on.
        active: PathBuf,
    },
    /// The snapshot is protected.
    #[error("snapshot {snapshot} of {vm} is protected")]
    Protected {
        /// The VM.
        vm: Name,
        /// The snapshot.
        snapshot: Name,
    },
    /// The user names a disk that the snapshot does not hold.
    #[error("snapshot {snapshot} of {vm} does not hold disk {disk}")]
    NotInSnapshot {
        /// The VM.
        vm: Name,
        /// The disk.
        disk: DiskName,
        /// The snapshot.
        snapshot: Name,
    },
    /// No disk of the VM goes back to the snapshot.
    #[error("no disk of {vm} is one that snapshot {snapshot} holds")]
    NothingToRevert {
        /// The VM.
        vm: Name,
        /// The snapshot.
        snapshot: Name,
    },
    /// A disk has another size now, which QEMU cannot change while it is in use.
    #[error("disk {disk} of {vm} has {now} now, and had {then} at the snapshot")]
    Resized {
        /// The VM.
        vm: Name,
        /// The disk.
        disk: DiskName,
        /// Its size now.
        now: ByteSize,
        /// Its size then.
        then: ByteSize,
    },
    /// A chain cannot be followed, so that nobody knows what stands on what.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// QEMU has other layers open than the files name.
    #[error("QEMU has {open} layers open below {} (disk {disk}), and the files' headers name {named}, or others", active.display())]
    ChainDiffers {
        /// The disk.
        disk: DiskName,
        /// Its active layer.
        active: PathBuf,
        /// Layers below it as QEMU has them.
        open: usize,
        /// Layers below it as the headers say.
        named: usize,
    },
    /// There is too little room for what is to be copied.
    #[error(transparent)]
    NoRoom(#[from] SpaceError),
    /// A guest that does not run cannot be frozen.
    #[error("{vm} is {status}, and only a running guest can be quiesced")]
    Paused {
        /// The VM.
        vm: Name,
        /// QEMU's word for it.
        status: String,
    },
    /// A copy would take the place of a file.
    #[error("{} exists already", path.display())]
    CopyExists {
        /// The file.
        path: PathBuf,
    },
    /// Encrypted layers of which no QEMU with their key has the file open.
    #[error("{} is encrypted, and only a QEMU that has it open knows its key", path.display())]
    EncryptedOffline {
        /// The VM.
        vm: Name,
        /// The layer.
        path: PathBuf,
    },
    /// A disk's image cannot hold snapshots inside.
    #[error("the image of disk {disk} is {format}, and only qcow2 images hold snapshots inside")]
    NotInternal {
        /// The disk.
        disk: DiskName,
        /// Its format.
        format: ImageFormat,
    },
    /// What is inside an image is not copied out of it.
    #[error("snapshot {snapshot} lies inside the images, and is not copied out of them")]
    CopyOfInternal {
        /// The snapshot.
        snapshot: Name,
    },
    /// A snapshot inside the images holds the memory, which belongs to every disk.
    #[error("a snapshot inside the images holds the memory too, and that belongs to all disks")]
    InternalOfSome,
    /// A snapshot is inside an image on which overlays stand by now.
    #[error("snapshot {snapshot} is inside {}, on which other layers stand by now", path.display())]
    InternalBelow {
        /// The snapshot.
        snapshot: Name,
        /// The image.
        path: PathBuf,
    },
    /// A file would go away, or stand on another one, that holds snapshots inside.
    #[error("{} holds snapshots inside, which would be lost", path.display())]
    HoldsInternal {
        /// The file.
        path: PathBuf,
    },
    /// A disk cannot be copied in the way that the user wants.
    #[error("disk {disk} cannot be copied by {method}: {why}")]
    NotAside {
        /// The disk.
        disk: DiskName,
        /// The way.
        method: &'static str,
        /// Why.
        why: String,
    },
    /// Overlays cannot go there.
    #[error("{} is no directory, so that no overlay can go there", dir.display())]
    NoOverlayDir {
        /// What the user named.
        dir: PathBuf,
    },
    /// Memory goes with overlays.
    #[error("with copies beside the active layers no memory is saved")]
    AsideMemory,
    /// A guest that is frozen in its memory would stay frozen when that is loaded.
    #[error(
        "with its memory a snapshot needs no freeze, and a frozen guest would be frozen when it is loaded"
    )]
    FrozenMemory,
    /// The memory of a guest that stands still is not saved: QEMU lets go of the disks then.
    #[error("{vm} is {status}, and memory is saved of a running guest only")]
    MemoryOfPaused {
        /// The VM.
        vm: Name,
        /// QEMU's word for it.
        status: String,
    },
    /// The memory cannot be saved while the guest runs on.
    #[error("the memory of {vm} cannot be saved live: {why}")]
    NoLiveMemory {
        /// The VM.
        vm: Name,
        /// Why.
        why: String,
    },
    /// The chain is as long as it may be.
    #[error("disk {disk} of {vm} has {length} layers already; at most {MAX_CHAIN} are allowed")]
    ChainTooLong {
        /// The VM.
        vm: Name,
        /// The disk.
        disk: DiskName,
        /// Its layers.
        length: usize,
    },
}

/// What chance and the clock decide, so that the plan itself is a pure function.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dice {
    pub operation: OperationId,
    pub snapshot: SnapshotId,
    pub now: Timestamp,
}

impl Dice {
    /// What they say now.
    pub fn roll() -> Self {
        Self {
            operation: OperationId::from_bits(random_bits()),
            snapshot: SnapshotId::from_bits(random_bits()),
            now: Timestamp::now(),
        }
    }
}

impl CreatePlan {
    /// Decides what to do. Pure: nothing is touched. `known` are the snapshots of every VM.
    ///
    /// # Errors
    /// [`Refusal`] if it would be unsafe or makes no sense.
    pub(crate) fn new(
        vm: &Name,
        request: &CreateRequest,
        machine: &Machine,
        platform: &Platform,
        known: &History,
        dice: Dice,
    ) -> Result<Self, Refusal> {
        refuse_busy(vm, request, machine)?;
        let name = name(vm, request, known, dice.now)?;
        let (chosen, mut skipped) = choose(vm, request, machine)?;
        skipped.extend(platform.others.iter().map(|other| SkippedDisk {
            disk: DiskName::new(other.kind.as_str()),
            reason: other.why.clone(),
        }));
        let bases: Vec<&Path> = chosen.iter().map(|(_, layer)| layer.path.as_path()).collect();
        let overlays = overlay_paths(&bases, dice.operation);
        let moved = overlays.into_iter().map(|path| match (&request.overlay_dir, path.file_name()) {
            (Some(dir), Some(name)) if aside::is_device(&path) => dir.join(name),
            _ => path,
        });
        let overlays: Vec<PathBuf> = moved.collect();
        let platform = overlays.first().map(|overlay| platform::plan(platform, overlay)).unwrap_or_default();
        let disks: Result<Vec<DiskPlan>, Refusal> = chosen
            .iter()
            .zip(overlays)
            .enumerate()
            .map(|(index, ((disk, layer), overlay))| {
                refuse_disk(vm, disk, layer, machine, known)?;
                Ok(disk_plan(disk, layer, index, overlay, dice.operation))
            })
            .collect();
        Ok(Self {
            operation: dice.operation,
            snapshot: dice.snapshot,
            vm: vm.clone(),
            name,
            description: request.description.clone(),
            labels: request.labels.clone(),
            freeze: freeze(request),
            memory: None,
            platform,
            disks: disks?,
            skipped,
            parent: chosen.iter().find_map(|(_, layer)| known.head(&layer.path)?.parent),
        })
    }

    /// The plan for people: every step with its undo, in order.
    pub fn steps(&self) -> Vec<PlannedStep> {
        let mut steps = Vec::new();
        let mut step = |step: String, undo: Option<String>| steps.push(PlannedStep { step, undo });
        for disk in &self.disks {
            let (overlay, base) = (disk.overlay.display(), disk.base.display());
            step(format!("create {overlay} on {base} ({})", disk.format), Some(format!("remove {overlay}")));
            step(
                format!("open it as node {} ({})", disk.overlay_node, disk.disk),
                Some(format!("close node {}", disk.overlay_node)),
            );
        }
        if let Some(freeze) = &self.freeze {
            if freeze.sync_first {
                step("let the guest write out its dirty pages".into(), Some("nothing to undo".into()));
            }
            let what = match freeze.mountpoints.as_slice() {
                [] => "every file system".to_owned(),
                some => some.join(", "),
            };
            step("start the thaw guard".into(), Some("end it".into()));
            step(format!("freeze {what} for at most {} s", freeze.limit), Some("thaw".into()));
        }
        for file in &self.platform {
            let (live, copy) = (file.live.display(), file.copy.display());
            step(format!("copy {live} to {copy}"), Some(format!("remove {copy}")));
        }
        if let Some(memory) = &self.memory {
            step(
                format!("create {}", memory.raw.display()),
                Some(format!("remove {}", memory.raw.display())),
            );
            step("hold the guest".into(), Some("let it go on".into()));
            if memory.method == MemoryMethod::Stop {
                let (ram, raw) = (memory.ram, memory.raw.display());
                step(format!("write {ram} of memory into {raw}"), Some("break that off".into()));
            }
        }
        let switches: Vec<String> =
            self.disks.iter().map(|disk| format!("{} to {}", disk.node, disk.overlay_node)).collect();
        let bitmaps: Vec<&str> =
            self.disks.iter().flat_map(|disk| &disk.bitmaps).map(|bitmap| bitmap.name.as_str()).collect();
        let carry = match bitmaps.as_slice() {
            [] => String::new(),
            some => format!("carry the dirty bitmaps {} over and ", some.join(", ")),
        };
        step(format!("in one transaction, {carry}switch {}", switches.join(", ")), None);
        if self.freeze.is_some() {
            step("thaw, and wait until it is confirmed".into(), None);
        }
        if let Some(memory) = &self.memory {
            let (ram, raw, path) = (memory.ram, memory.raw.display(), memory.path.display());
            let write = match memory.method {
                MemoryMethod::Live => format!("let the guest go on, and write {ram} of memory into {raw}"),
                MemoryMethod::Stop => "let the guest go on".to_owned(),
            };
            step(write, None);
            step(format!("compress {raw} into {path}"), None);
        }
        step("look whether every disk runs on its overlay".into(), None);
        for disk in &self.disks {
            step(format!("seal {} against writing", disk.base.display()), None);
        }
        step(format!("enter snapshot {} in the catalogue", self.name), None);
        steps
    }
}

fn refuse_busy(vm: &Name, request: &CreateRequest, machine: &Machine) -> Result<(), Refusal> {
    if request.labels.len() > MAX_LABELS {
        return Err(Refusal::TooManyLabels(request.labels.len()));
    }
    refuse_migration(vm, machine)?;
    if request.memory.is_some() && request.quiesce != Quiesce::Off {
        return Err(Refusal::FrozenMemory);
    }
    if request.memory.is_some() && !machine.status.running {
        return Err(Refusal::MemoryOfPaused { vm: vm.clone(), status: machine.status.status.clone() });
    }
    if request.quiesce == Quiesce::Require && !machine.status.running {
        return Err(Refusal::Paused { vm: vm.clone(), status: machine.status.status.clone() });
    }
    Ok(())
}

pub(crate) fn refuse_migration(vm: &Name, machine: &Machine) -> Result<(), Refusal> {
    if !machine.migration.is_active() {
        return Ok(());
    }
    let status = machine.migration.status.clone().unwrap_or_default();
    Err(Refusal::MigrationActive { vm: vm.clone(), status })
}

fn name(vm: &Name, request: &CreateRequest, known: &History, now: Timestamp) -> Result<Name, Refusal> {
    if let Some(name) = &request.name {
        return match is_taken(vm, known, name) {
            true => Err(Refusal::NameTaken { vm: vm.clone(), name: name.clone() }),
            false => Ok(name.clone()),
        };
    }
    let stem = now.strftime("%Y%m%d-%H%M%S").to_string();
    free_name(vm, known, &stem).ok_or_else(|| Refusal::NoDisk { vm: vm.clone(), skipped: Vec::new() })
}

fn is_taken(vm: &Name, known: &History, name: &Name) -> bool {
    known.visible().any(|snapshot| snapshot.vm == *vm && snapshot.name == *name)
}

/// `stem`, or `stem-2` and so on where that is taken.
pub(crate) fn free_name(vm: &Name, known: &History, stem: &str) -> Option<Name> {
    let names = std::iter::once(stem.to_owned()).chain((2..).map(|n| format!("{stem}-{n}")));
    names.filter_map(|name| name.parse().ok()).find(|name| !is_taken(vm, known, name))
}

/// Disks to take with their active layers, and drives that are left out.
type Choice<'a> = (Vec<(&'a Disk, &'a ActiveLayer)>, Vec<SkippedDisk>);

fn choose<'a>(vm: &Name, request: &CreateRequest, machine: &'a Machine) -> Result<Choice<'a>, Refusal> {
    let disks = &machine.disks;
    let named: Result<Vec<&Disk>, vm::Error> =
        request.disks.iter().map(|name| select(vm, disks, name)).collect();
    let named = named?;
    let wanted = |disk: &Disk| named.is_empty() || named.iter().any(|named| named.name == disk.name);
    let mut chosen = Vec::new();
    let mut skipped = Vec::new();
    for disk in disks {
        let skip = |reason: &str| SkippedDisk { disk: disk.name.clone(), reason: reason.to_owned() };
        match &disk.content {
            _ if !wanted(disk) => skipped.push(skip("not asked for")),
            Content::Layer(layer) => chosen.push((disk, layer)),
            Content::Skipped(why) if named.is_empty() => skipped.push(skip(why.as_str())),
            Content::Skipped(why) => {
                let reason = why.as_str().to_owned();
                return Err(Refusal::DiskSkipped { vm: vm.clone(), disk: disk.name.clone(), reason });
            }
            Content::Unfit(reason) => {
                // A job may have put a filter of its own on top; that passes.
                refuse_job(vm, disk, &disk.names, machine)?;
                let fit = disks.iter().filter(|other| other.layer().is_some());
                return Err(Refusal::DiskUnfit {
                    vm: vm.clone(),
                    disk: disk.name.clone(),
                    reason: reason.clone(),
                    others: fit.map(|other| other.name.clone()).collect(),
                });
            }
        }
    }
    match chosen.is_empty() {
        true => Err(Refusal::NoDisk { vm: vm.clone(), skipped }),
        false => Ok((chosen, skipped)),
    }
}

fn refuse_disk(
    vm: &Name,
    disk: &Disk,
    layer: &ActiveLayer,
    machine: &Machine,
    known: &History,
) -> Result<(), Refusal> {
    refuse_job(vm, disk, &layer.nodes, machine)?;
    refuse_busy_bitmap(vm, disk, layer)?;
    refuse_stale(vm, disk, &layer.path, known)?;
    let length = 1 + layer.below.len();
    if length >= MAX_CHAIN {
        return Err(Refusal::ChainTooLong { vm: vm.clone(), disk: disk.name.clone(), length });
    }
    Ok(())
}

pub(crate) fn refuse_job(vm: &Name, disk: &Disk, nodes: &[String], machine: &Machine) -> Result<(), Refusal> {
    match nodes.iter().find_map(|node| machine.jobs_on(node).first().copied()) {
        None => Ok(()),
        Some(job) => {
            let (vm, disk, job) = (vm.clone(), disk.name.clone(), job.to_owned());
            Err(Refusal::JobActive { vm, disk, job })
        }
    }
}

pub(crate) fn refuse_busy_bitmap(vm: &Name, disk: &Disk, layer: &ActiveLayer) -> Result<(), Refusal> {
    bitmaps::busy(&layer.bitmaps).map_or(Ok(()), |bitmap| {
        Err(Refusal::BitmapBusy { vm: vm.clone(), disk: disk.name.clone(), bitmap: bitmap.to_owned() })
    })
}

fn disk_plan(
    disk: &Disk,
    layer: &ActiveLayer,
    index: usize,
    overlay: PathBuf,
    operation: OperationId,
) -> DiskPlan {
    let (overlay_node, file_node) = overlay_nodes(operation, index);
    DiskPlan {
        disk: disk.name.clone(),
        node: layer.node.clone(),
        base: layer.path.clone(),
        format: layer.format,
        virtual_size: layer.virtual_size,
        options: layer.options.clone(),
        bitmaps: bitmaps::following(&layer.bitmaps),
        backing: None,
        overlay,
        overlay_node,
        file_node,
    }
}

/// The format node and the protocol node of an operation's overlay number `index`.
pub(crate) fn overlay_nodes(operation: OperationId, index: usize) -> (String, String) {
    let node = format!("s{}-{index}", operation.tag());
    let file = format!("{node}f");
    (node, file)
}

pub(crate) fn refuse_stale(vm: &Name, disk: &Disk, path: &Path, known: &History) -> Result<(), Refusal> {
    let Some(snapshot) = known.holder(path) else { return Ok(()) };
    Err(Refusal::StaleLayer {
        vm: vm.clone(),
        disk: disk.name.clone(),
        layer: path.to_owned(),
        snapshot: snapshot.name.clone(),
        active: went_on_in(known, path).to_owned(),
    })
}

fn freeze(request: &CreateRequest) -> Option<FreezePlan> {
    let required = match request.quiesce {
        Quiesce::Off => return None,
        Quiesce::Try => false,
        Quiesce::Require => true,
    };
    Some(FreezePlan {
        required,
        mountpoints: request.mountpoints.clone(),
        limit: request.max_freeze.as_secs_f64(),
        sync_first: request.sync_first,
    })
}

fn list(skipped: &[SkippedDisk]) -> String {
    match skipped {
        [] => "it has no drives".into(),
        some => some.iter().map(|s| format!("{} ({})", s.disk, s.reason)).collect::<Vec<_>>().join(", "),
    }
}

#[cfg(test)]
mod tests {
    use model::{LayerRecord, SnapshotRecord};
    use serde_json::json;
    use vm::disks::Skip;

    use super::*;

    fn vm() -> Name {
        "vm1".parse().unwrap()
    }

    fn disk(name: &str, content: Content) -> Disk {
        Disk {
            name: DiskName::new(name),
            names: vec![name.into(), format!("node-{name}")],
            aliased: false,
            content,
        }
    }

    fn layer(name: &str, path: &str) -> Disk {
        let layer = ActiveLayer {
            node: format!("node-{name}"),
            format: ImageFormat::Raw,
            path: path.into(),
            virtual_size: ByteSize(1 << 20),
            options: NodeOptions { detect_zeroes: "off".into(), ..NodeOptions::default() },
            bitmaps: Vec::new(),
            nodes: vec![format!("node-{name}"), format!("proto-{name}")],
            below: Vec::new(),
        };
        disk(name, Content::Layer(layer))
    }

    fn machine(disks: Vec<Disk>) -> Machine {
        let reply = json!({
            "status": {"running": true, "status": "running"},
            "graph": {"nodes": [], "edges": []},
            "migration": {},
        });
        let of = |name: &str| reply[name].clone();
        Machine {
            status: serde_json::from_value(of("status")).unwrap(),
            disks,
            nodes: Vec::new(),
            graph: serde_json::from_value(of("graph")).unwrap(),
            jobs: Vec::new(),
            migration: serde_json::from_value(of("migration")).unwrap(),
            chardevs: Vec::new(),
            blocks: Vec::new(),
            pid: None,
            cwd: None,
        }
    }

    fn request() -> CreateRequest {
        CreateRequest {
            name: None,
            description: None,
            labels: BTreeMap::new(),
            quiesce: Quiesce::Require,
            mountpoints: Vec::new(),
            disks: Vec::new(),
            max_freeze: DEFAULT_MAX_FREEZE,
            sync_first: true,
            memory: None,
            overlay_dir: None,
        }
    }

    fn dice() -> Dice {
        Dice {
            operation: OperationId::from_bits(0x1a2b_3c4d_0000_0000),
            snapshot: SnapshotId::from_bits(7),
            now: Timestamp::from_second(1_800_000_000).unwrap(),
        }
    }

    fn record(name: &str, path: &str, overlay: &str) -> SnapshotRecord {
        SnapshotRecord {
            disks: vec![LayerRecord::new(
                DiskName::new("a"),
                path.into(),
                ImageFormat::Raw,
                overlay.into(),
                ByteSize(1 << 20),
            )],
            ..SnapshotRecord::new(
                SnapshotId::from_bits(3),
                vm(),
                name.parse().unwrap(),
                Timestamp::UNIX_EPOCH,
            )
        }
    }

    fn plan(
        request: &CreateRequest,
        machine: &Machine,
        known: &[SnapshotRecord],
    ) -> Result<CreatePlan, Refusal> {
        let mut history = History::default();
        known.iter().for_each(|record| history.enter(record.clone()));
        CreatePlan::new(&vm(), request, machine, &Platform::default(), &history, dice())
    }

    #[test]
    fn every_disk_gets_an_overlay_beside_its_base_and_nodes_of_the_operation() {
        let machine = machine(vec![
            layer("a", "/i/a.raw"),
            disk("cd", Content::Skipped(Skip::Empty)),
            layer("b", "/j/a.raw"),
        ]);
        let plan = plan(&request(), &machine, &[]).unwrap();
        let overlays: Vec<_> = plan.disks.iter().map(|disk| disk.overlay.to_str().unwrap()).collect();
        assert_eq!(overlays, ["/i/a.1a2b3c4d.qcow2", "/j/a.1a2b3c4d.qcow2"]);
        assert_eq!(plan.disks[1].overlay_node, "s1a2b3c4d-1");
        assert_eq!(plan.disks[1].file_node, "s1a2b3c4d-1f");
        assert_eq!(plan.skipped, [SkippedDisk { disk: DiskName::new("cd"), reason: "no medium".into() }]);
        assert_eq!(plan.name.as_str(), "20270115-080000");
    }

    #[test]
    fn every_step_before_the_point_has_an_undo_and_none_after_it() {
        let steps =
            plan(&request(), &machine(vec![layer("a", "/i/a"), layer("b", "/i/b")]), &[]).unwrap().steps();
        let point = steps.iter().position(|step| step.step.starts_with("in one transaction")).unwrap();
        assert!(steps[..point].iter().all(|step| step.undo.is_some()), "{steps:?}");
        assert!(steps[point..].iter().all(|step| step.undo.is_none()), "{steps:?}");
    }

    #[test]
    fn a_generated_name_steps_aside_and_a_given_one_is_refused() {
        let machine = machine(vec![layer("a", "/i/new")]);
        let taken = [record("20270115-080000", "/i/x", "/i/y"), record("20270115-080000-2", "/i/x", "/i/y")];
        assert_eq!(plan(&request(), &machine, &taken).unwrap().name.as_str(), "20270115-080000-3");
        let named = CreateRequest { name: Some("20270115-080000".parse().unwrap()), ..request() };
        assert!(matches!(plan(&named, &machine, &taken), Err(Refusal::NameTaken { .. })));
    }

    #[test]
    fn q5_a_vm_on_a_frozen_layer_is_refused_with_the_layer_that_it_should_be_on() {
        let known = [record("one", "/i/a", "/i/a.1"), record("two", "/i/a.1", "/i/a.2")];
        for stale in ["/i/a", "/i/a.1"] {
            let refusal = plan(&request(), &machine(vec![layer("a", stale)]), &known).unwrap_err();
            assert!(
                matches!(&refusal, Refusal::StaleLayer { active, .. } if active == Path::new("/i/a.2")),
                "{refusal:?}"
            );
        }
        assert!(plan(&request(), &machine(vec![layer("a", "/i/a.2")]), &known).is_ok());
    }

    #[test]
    fn jobs_migrations_and_pauses_are_refused() {
        let mut busy = machine(vec![layer("a", "/i/a")]);
        busy.graph = serde_json::from_value(json!({
            "nodes": [{"id": 1, "type": "block-driver", "name": "proto-a"}, {"id": 2, "type": "block-job", "name": "mirror0"}],
            "edges": [{"parent": 2, "child": 1, "name": "main node"}],
        }))
        .unwrap();
        assert!(
            matches!(plan(&request(), &busy, &[]), Err(Refusal::JobActive { job, .. }) if job == "mirror0")
        );

        let mut moving = machine(vec![layer("a", "/i/a")]);
        for (status, refused) in [("active", true), ("a-state-of-tomorrow", true), ("completed", false)] {
            moving.migration.status = Some(status.into());
            assert_eq!(plan(&request(), &moving, &[]).is_err(), refused, "{status}");
        }

        let mut paused = machine(vec![layer("a", "/i/a")]);
        paused.status.running = false;
        assert!(matches!(plan(&request(), &paused, &[]), Err(Refusal::Paused { .. })));
        let crash = CreateRequest { quiesce: Quiesce::Off, ..request() };
        assert!(plan(&crash, &paused, &[]).is_ok());
    }

    #[test]
    fn disks_that_cannot_take_part_are_refused_unless_left_out() {
        let machine = machine(vec![
            layer("a", "/i/a"),
            disk("net", Content::Unfit("it is far away".into())),
            disk("cd", Content::Skipped(Skip::Empty)),
        ]);
        let of = |disks: &[&str]| CreateRequest {
            disks: disks.iter().map(|d| (*d).into()).collect(),
            ..request()
        };
        assert!(
            matches!(plan(&of(&[]), &machine, &[]), Err(Refusal::DiskUnfit { others, .. }) if others.len() == 1)
        );
        assert_eq!(plan(&of(&["node-a"]), &machine, &[]).unwrap().disks.len(), 1);
        assert!(matches!(plan(&of(&["net"]), &machine, &[]), Err(Refusal::DiskUnfit { .. })));
        assert!(matches!(plan(&of(&["a", "cd"]), &machine, &[]), Err(Refusal::DiskSkipped { .. })));
        assert!(matches!(plan(&of(&["a", "zz"]), &machine, &[]), Err(Refusal::Disk(_))));
    }

    #[test]
    fn a_plan_survives_the_journal() {
        let plan = plan(&request(), &machine(vec![layer("a", "/i/a")]), &[]).unwrap();
        let text = serde_json::to_string(&plan).unwrap();
        assert_eq!(serde_json::from_str::<CreatePlan>(&text).unwrap(), plan);
    }
}
