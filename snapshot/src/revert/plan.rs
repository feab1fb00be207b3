//! The plan of a revert: a pure value, made of what was asked and what was observed.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use model::{
    ByteSize, CopyMethod, DiskName, History, ImageFormat, LayerRecord, MemoryRecord, Name, OperationId,
    PlannedStep, PlatformFile, SnapshotId, SnapshotRecord,
};
use serde::{Deserialize, Serialize};
use storage::overlay::overlay_paths;
use vm::platform::{Platform, PlatformState};

use crate::aside;
use crate::lineage::went_on_in;
use crate::merge::Going;
use crate::plan::{DiskPlan, Refusal, free_name, overlay_nodes};
use crate::platform;

/// What the user asks for.
#[derive(Clone, Debug)]
pub struct RevertRequest {
    /// The snapshot, by name, id, unique prefix, or `latest`.
    pub snapshot: String,
    /// Disks to revert, by any of their names; all that the snapshot holds if empty.
    pub disks: Vec<String>,
    /// Whether what came after the snapshot is thrown away, not kept as a branch.
    pub discard: bool,
}

/// Everything that a revert will do, decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RevertPlan {
    /// The operation's id, part of every name that it makes.
    pub operation: OperationId,
    /// The VM.
    pub vm: Name,
    /// The snapshot that is gone back to.
    pub snapshot: Going,
    /// The memory of the same instant, if there is some and every disk goes back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryRecord>,
    /// Firmware variables and TPM state as they were at the snapshot: they are put back where the VM does not run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub platform: Vec<PlatformFile>,
    /// Copies of what these are now, for the branch.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub platform_now: Vec<PlatformFile>,
    /// The snapshot that keeps what came after it; none if that is discarded.
    pub branch: Option<Going>,
    /// The disks that go back.
    pub disks: Vec<RevertDisk>,
    /// Disks that stay as they are, since the snapshot or the user leaves them out.
    pub staying: Vec<DiskName>,
    /// Whether the guest runs, and is to run afterwards.
    pub runs: bool,
    /// Whether QEMU would end where its guest is reset (`-no-reboot`).
    pub ends_on_reset: bool,
}

/// What is done to one disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RevertDisk {
    /// The new overlay; its base is the layer that holds the snapshot.
    pub new: DiskPlan,
    /// How the new layer is made of its base where that is a copy; it is no overlay then, and stands alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renewed: Option<CopyMethod>,
    /// The topmost node of the disk, if QEMU runs.
    pub root: String,
    /// The active layer until now.
    pub old: PathBuf,
    /// Its format.
    pub old_format: ImageFormat,
    /// What the guest saw of it.
    pub old_size: ByteSize,
    /// What it takes on its file system.
    pub old_allocated: ByteSize,
    /// The snapshot on which it stands, if on any.
    pub old_parent: Option<SnapshotId>,
}

/// A disk of the VM as it is now.
#[derive(Clone, Debug)]
pub(super) struct Current {
    pub disk: DiskName,
    pub names: Vec<String>,
    pub root: String,
    pub node: String,
    pub path: PathBuf,
    pub format: ImageFormat,
    pub virtual_size: ByteSize,
    pub allocated: ByteSize,
    pub options: vm::disks::NodeOptions,
}

/// What chance, the clock and QEMU's command line decide.
#[derive(Clone, Copy, Debug)]
pub(super) struct Given {
    pub operation: OperationId,
    pub branch: SnapshotId,
    pub now: Timestamp,
    pub runs: bool,
    pub ends_on_reset: bool,
}

impl RevertPlan {
    /// Decides what to do. Pure: nothing is touched.
    pub(super) fn new(
        vm: &Name,
        request: &RevertRequest,
        snapshot: &SnapshotRecord,
        current: &[Current],
        known: &History,
        given: Given,
    ) -> Result<Self, Refusal> {
        let (chosen, staying) = choose(vm, request, snapshot, current, known)?;
        let bases: Vec<&Path> = chosen.iter().map(|(layer, _)| layer.path.as_path()).collect();
        // Beside a device there is no place: what stands on it has one.
        let overlays = overlay_paths(&bases, given.operation).into_iter().zip(&chosen);
        let overlays = overlays.map(|(path, (_, current))| match (current.path.parent(), path.file_name()) {
            (Some(dir), Some(name)) if aside::is_device(&path) => dir.join(name),
            _ => path,
        });
        let disks: Vec<RevertDisk> = chosen
            .iter()
            .zip(overlays)
            .enumerate()
            .map(|(index, ((layer, current), overlay))| {
                revert_disk(layer, current, known, given.operation, index, overlay)
            })
            .collect();
        let branch =
            (!request.discard).then(|| Going { id: given.branch, name: branch_name(vm, known, given.now) });
        Ok(Self {
            operation: given.operation,
            vm: vm.clone(),
            snapshot: Going { id: snapshot.id, name: snapshot.name.clone() },
            memory: snapshot.memory.clone().filter(|_| staying.is_empty()),
            platform: snapshot.platform.clone(),
            platform_now: disks.first().map(|disk| copies_of_now(snapshot, disk)).unwrap_or_default(),
            branch,
            disks,
            staying,
            runs: given.runs,
            ends_on_reset: given.ends_on_reset,
        })
    }

    /// Whether a QEMU has the disks open, be its guest held or not.
    pub fn is_online(&self) -> bool {
        self.disks.iter().any(|disk| !disk.root.is_empty())
    }

    /// The plan for people: what is given up first, then every step with its undo.
    pub fn steps(&self) -> Vec<PlannedStep> {
        let mut steps = Vec::new();
        let mut step = |step: String, undo: Option<String>| steps.push(PlannedStep { step, undo });
        for disk in &self.disks {
            let (overlay, base) = (disk.new.overlay.display(), disk.new.base.display());
            step(
                match disk.renewed {
                    Some(method) => {
                        format!("copy {base} to {overlay} by {} ({})", method.as_str(), disk.new.disk)
                    }
                    None => format!("create {overlay} on {base} ({})", disk.new.disk),
                },
                Some(format!("remove {overlay}")),
            );
        }
        if self.runs {
            step("hold the guest".into(), Some("let it go on".into()));
        }
        for disk in &self.disks {
            let (old, new) = (disk.old.display(), disk.new.overlay.display());
            step(format!("switch {} from {old} to {new}", disk.new.disk), None);
        }
        for disk in self.disks.iter().filter(|_| self.branch.is_some()) {
            step(format!("seal {} against writing", disk.old.display()), None);
        }
        if let Some(branch) = &self.branch {
            step(format!("enter snapshot {} in the catalogue", branch.name), None);
        }
        for file in self.platform.iter().filter(|_| !self.is_online()) {
            step(format!("put {} back, as it is in {}", file.live.display(), file.copy.display()), None);
        }
        if self.runs {
            step("reset the guest, which starts from its disks again".into(), None);
        }
        for disk in self.disks.iter().filter(|_| self.branch.is_none()) {
            step(format!("remove {}", disk.old.display()), None);
        }
        steps
    }

    /// What the catalogue is to remember.
    pub(super) fn enter(&self, history: &mut History, now: Timestamp, sealed: impl Fn(&Path) -> Option<u32>) {
        match &self.branch {
            Some(branch) => history.enter(self.branch_record(branch, now, sealed)),
            None => {
                for disk in &self.disks {
                    history.replace(&disk.old, &disk.new.overlay, disk.new_format(), None);
                }
            }
        }
        for disk in &self.disks {
            for head in history.heads.iter_mut().filter(|head| head.path == disk.new.overlay) {
                head.parent = Some(self.snapshot.id);
                head.format = disk.new_format();
            }
        }
    }

    fn branch_record(
        &self,
        branch: &Going,
        now: Timestamp,
        sealed: impl Fn(&Path) -> Option<u32>,
    ) -> SnapshotRecord {
        let layers = self.disks.iter().map(|disk| {
            let (overlay, sealed_mode) = (disk.new.overlay.clone(), sealed(&disk.old));
            let (name, old) = (disk.new.disk.clone(), disk.old.clone());
            LayerRecord {
                sealed_mode,
                key_secret: disk.new.options.key_secret.clone(),
                ..LayerRecord::new(name, old, disk.old_format, overlay, disk.old_size)
            }
        });
        SnapshotRecord {
            description: Some(format!("what was there before the revert to {}", self.snapshot.name)),
            disks: layers.collect(),
            platform: self.platform_now.clone(),
            parent: self.disks.iter().find_map(|disk| disk.old_parent),
            ..SnapshotRecord::new(branch.id, self.vm.clone(), branch.name.clone(), now)
        }
    }
}

impl RevertDisk {
    /// The format of the layer in which the disk goes on.
    pub fn new_format(&self) -> ImageFormat {
        if self.renewed.is_some() { self.new.format } else { ImageFormat::Qcow2 }
    }
}

fn copies_of_now(snapshot: &SnapshotRecord, first: &RevertDisk) -> Vec<PlatformFile> {
    let state = |file: &PlatformFile| PlatformState { kind: file.kind, files: vec![file.live.clone()] };
    let states = snapshot.platform.iter().map(state).collect();
    platform::plan(&Platform { states, others: Vec::new() }, &first.new.overlay)
}

/// Layers of the snapshot with the disks that go back to them, and disks that stay.
type Choice<'a> = (Vec<(&'a LayerRecord, &'a Current)>, Vec<DiskName>);

fn choose<'a>(
    vm: &Name,
    request: &RevertRequest,
    snapshot: &'a SnapshotRecord,
    current: &'a [Current],
    known: &History,
) -> Result<Choice<'a>, Refusal> {
    let names = || current.iter().map(|disk| disk.disk.to_string()).collect();
    let no_disk =
        |name: &str| vm::Error::NoSuchDisk { vm: vm.clone(), name: name.to_owned(), known: names() };
    let named =
        |name: &String| current.iter().find(|disk| disk.names.contains(name)).ok_or_else(|| no_disk(name));
    let wanted: Vec<&Current> = request.disks.iter().map(named).collect::<Result<_, _>>()?;
    let mut chosen = Vec::new();
    let mut staying = Vec::new();
    for disk in current {
        let layer = snapshot.disks.iter().find(|layer| went_on_in(known, &layer.path) == disk.path);
        let is_wanted = wanted.is_empty() || wanted.iter().any(|wanted| wanted.path == disk.path);
        match layer {
            Some(layer) if is_wanted => chosen.push((layer, disk)),
            None if is_wanted && !wanted.is_empty() => {
                return Err(Refusal::NotInSnapshot {
                    vm: vm.clone(),
                    disk: disk.disk.clone(),
                    snapshot: snapshot.name.clone(),
                });
            }
            _ => staying.push(disk.disk.clone()),
        }
    }
    match chosen.is_empty() {
        false => Ok((chosen, staying)),
        true => Err(Refusal::NothingToRevert { vm: vm.clone(), snapshot: snapshot.name.clone() }),
    }
}

fn revert_disk(
    layer: &LayerRecord,
    current: &Current,
    known: &History,
    operation: OperationId,
    index: usize,
    overlay: PathBuf,
) -> RevertDisk {
    let (overlay_node, file_node) = overlay_nodes(operation, index);
    RevertDisk {
        renewed: layer.copied,
        new: DiskPlan {
            bitmaps: Vec::new(),
            backing: None,
            disk: current.disk.clone(),
            node: current.node.clone(),
            base: layer.path.clone(),
            format: layer.format,
            virtual_size: layer.virtual_size,
            options: current.options.clone(),
            overlay,
            overlay_node,
            file_node,
        },
        root: current.root.clone(),
        old: current.path.clone(),
        old_format: current.format,
        old_size: current.virtual_size,
        old_allocated: current.allocated,
        old_parent: known.head(&current.path).and_then(|head| head.parent),
    }
}

/// What the snapshot is called that keeps what was there before a revert.
pub(crate) fn branch_name(vm: &Name, known: &History, now: Timestamp) -> Name {
    let stem = now.strftime("before-revert-%Y%m%d-%H%M%S").to_string();
    free_name(vm, known, &stem).unwrap_or_else(|| vm.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(bits: u64, path: &str, overlay: &str, parent: Option<u64>) -> SnapshotRecord {
        SnapshotRecord {
            disks: vec![LayerRecord::new(
                DiskName::new("a"),
                path.into(),
                ImageFormat::Qcow2,
                overlay.into(),
                ByteSize(1),
            )],
            parent: parent.map(SnapshotId::from_bits),
            ..SnapshotRecord::new(
                SnapshotId::from_bits(bits),
                "vm1".parse().unwrap(),
                format!("s{bits}").parse().unwrap(),
                Timestamp::UNIX_EPOCH,
            )
        }
    }

    fn known() -> History {
        let mut known = History::default();
        known.enter(record(1, "/i/a", "/i/a.1", None));
        known.enter(record(2, "/i/a.1", "/i/a.2", Some(1)));
        known
    }

    fn current(name: &str, path: &str) -> Current {
        Current {
            disk: DiskName::new(name),
            names: vec![name.into()],
            root: "root".into(),
            node: "node".into(),
            path: path.into(),
            format: ImageFormat::Qcow2,
            virtual_size: ByteSize(1),
            allocated: ByteSize(1),
            options: vm::disks::NodeOptions { detect_zeroes: "off".into(), ..Default::default() },
        }
    }

    fn plan(disks: &[&str], discard: bool, current: &[Current]) -> Result<RevertPlan, Refusal> {
        let known = known();
        let request = RevertRequest {
            snapshot: "s1".into(),
            disks: disks.iter().map(|disk| (*disk).to_owned()).collect(),
            discard,
        };
        let given = Given {
            operation: OperationId::from_bits(0xabcd_ef01_2345_6789),
            branch: SnapshotId::from_bits(9),
            now: Timestamp::UNIX_EPOCH,
            runs: true,
            ends_on_reset: false,
        };
        RevertPlan::new(&"vm1".parse().unwrap(), &request, &known.snapshots[0], current, &known, given)
    }

    #[test]
    fn a_disk_goes_back_to_its_layer_and_what_came_after_is_a_branch() {
        let plan = plan(&[], false, &[current("a", "/i/a.2"), current("b", "/i/b")]).unwrap();
        let disk = &plan.disks[0];
        assert_eq!((disk.new.base.as_path(), disk.old.as_path()), (Path::new("/i/a"), Path::new("/i/a.2")));
        assert_eq!(plan.staying, [DiskName::new("b")]);
        let mut history = known();
        plan.enter(&mut history, Timestamp::UNIX_EPOCH, |_| Some(0o644));
        assert_eq!(history.heads[0].path, disk.new.overlay);
        assert_eq!(history.heads[0].parent, Some(SnapshotId::from_bits(1)));
        let branch = history.snapshots.last().unwrap();
        assert_eq!(branch.parent, Some(SnapshotId::from_bits(2)));
        assert_eq!(
            (branch.disks[0].path.as_path(), branch.disks[0].sealed_mode),
            (Path::new("/i/a.2"), Some(0o644))
        );
        // Whoever starts from any older layer is led to the new one.
        assert_eq!(went_on_in(&history, Path::new("/i/a")), disk.new.overlay);
    }

    #[test]
    fn what_is_discarded_leaves_no_record() {
        let plan = plan(&[], true, &[current("a", "/i/a.2")]).unwrap();
        let mut history = known();
        plan.enter(&mut history, Timestamp::UNIX_EPOCH, |_| None);
        assert_eq!(history.snapshots.len(), 2);
        assert_eq!(history.snapshots[1].disks[0].overlay, plan.disks[0].new.overlay);
        assert_eq!(history.heads[0].parent, Some(SnapshotId::from_bits(1)));
        assert!(plan.steps().last().unwrap().step.contains("remove /i/a.2"));
    }

    #[test]
    fn disks_that_the_snapshot_does_not_hold_are_refused_by_name() {
        let disks = [current("a", "/i/a.2"), current("b", "/i/b")];
        assert!(matches!(plan(&["b"], false, &disks), Err(Refusal::NotInSnapshot { .. })));
        assert!(matches!(plan(&["c"], false, &disks), Err(Refusal::Disk(_))));
        assert!(matches!(plan(&[], false, &disks[1..]), Err(Refusal::NothingToRevert { .. })));
    }
}
