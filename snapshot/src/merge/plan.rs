//! The plan of a deletion, of a flattening, or of what an earlier one left: a pure value.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use model::{ByteSize, DiskName, History, InternalRecord, Name, OperationId, PlannedStep, SnapshotId};
use serde::{Deserialize, Serialize};

use super::forest::{Forest, Merge, Staying};
use super::survey::Survey;
use crate::platform;

/// Everything that a deletion or a flattening will do, decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergePlan {
    /// The operation's id, part of every name that it makes.
    pub operation: OperationId,
    /// The VM.
    pub vm: Name,
    /// The snapshots that go away.
    pub snapshots: Vec<Going>,
    /// Files of these snapshots that are no layers, which are removed: memory, firmware variables, TPM state.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub beside: Vec<PathBuf>,
    /// Where those of them are that lie inside the images.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub internal: Vec<InternalRecord>,
    /// What is merged, disk by disk. Those of one disk follow each other; disks do not wait for each other.
    pub disks: Vec<DiskMerges>,
    /// Layers that nobody needs and that have to stay for now.
    pub staying: Vec<Staying>,
}

/// A snapshot that goes away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Going {
    /// Its id.
    pub id: SnapshotId,
    /// Its name.
    pub name: Name,
}

/// What is done to one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMerges {
    /// The disk.
    pub disk: DiskName,
    /// Its merges, in order.
    pub merges: Vec<Merge>,
}

impl MergePlan {
    /// Decides what to do. Pure: nothing is touched. In `survey`, `going` are deleted already.
    pub(super) fn new(
        operation: OperationId,
        vm: &Name,
        going: Vec<Going>,
        flatten: &[PathBuf],
        survey: &Survey,
        known: &History,
    ) -> Self {
        let mut after = survey.forest.clone();
        let mut merges: Vec<Merge> = Vec::new();
        for merge in flatten.iter().filter_map(|head| survey.forest.flatten(head)) {
            after.apply(&merge);
            merges.push(merge);
        }
        let (rest, staying) = after.all();
        merges.extend(rest);
        let disks = by_disk(merges, survey, known);
        let is_going = |id: SnapshotId| going.iter().any(|going| going.id == id);
        let gone = || known.snapshots.iter().filter(|snapshot| is_going(snapshot.id));
        let beside = gone().flat_map(platform::beside).collect();
        let internal = gone().filter_map(|snapshot| snapshot.internal.clone()).collect();
        Self { operation, vm: vm.clone(), snapshots: going, beside, internal, disks, staying }
    }

    /// Every merge.
    pub fn merges(&self) -> impl Iterator<Item = &Merge> {
        self.disks.iter().flat_map(|disk| &disk.merges)
    }

    /// At most so much is copied.
    pub fn copied(&self) -> ByteSize {
        ByteSize(self.merges().map(|merge| merge.copied().0).fold(0, u64::saturating_add))
    }

    /// The plan for people, in order. What is merged cannot be taken back: the undo of a deletion is that it
    /// is not begun.
    pub fn steps(&self) -> Vec<PlannedStep> {
        let names: Vec<&str> = self.snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect();
        let mark = match names.as_slice() {
            [] => None,
            [one] => Some(format!("delete snapshot {one} from the catalogue")),
            several => Some(format!("delete snapshots {} from the catalogue", several.join(", "))),
        };
        let merges =
            self.disks.iter().flat_map(|disk| disk.merges.iter().flat_map(move |merge| lines(disk, merge)));
        let beside = self.beside.iter().map(|path| format!("remove {}", path.display()));
        let inside = self.internal.iter().flat_map(|internal| &internal.disks);
        let inside = inside.map(|disk| format!("{}: remove it inside {}", disk.disk, disk.path.display()));
        mark.into_iter()
            .chain(beside)
            .chain(inside)
            .chain(merges)
            .map(|step| PlannedStep { step, undo: None })
            .collect()
    }
}

fn lines(disk: &DiskMerges, merge: &Merge) -> Vec<String> {
    let name = &disk.disk;
    let mut lines = match merge {
        Merge::Commit { base, gone, overlay, bytes, .. } => {
            let place = match overlay {
                Some(overlay) => format!("put it below {}", overlay.display()),
                None => "make it the active layer".to_owned(),
            };
            vec![format!(
                "{name}: copy at most {bytes} from {} down into {}, and {place}",
                list(gone),
                base.display()
            )]
        }
        Merge::Stream { into, gone, below, bytes, .. } => {
            let place = match below {
                Some(below) => format!("put it on {}", below.display()),
                None => "let it stand alone".to_owned(),
            };
            vec![format!(
                "{name}: copy at most {bytes} from {} up into {}, and {place}",
                list(gone),
                into.display()
            )]
        }
        Merge::Remove { .. } => Vec::new(),
    };
    lines.extend(merge.removed().iter().map(|path| format!("{name}: remove {}", path.display())));
    lines
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Groups merges by the tree that they are in: only those of different trees do not touch the same files.
fn by_disk(merges: Vec<Merge>, survey: &Survey, known: &History) -> Vec<DiskMerges> {
    let Survey { forest, heads } = survey;
    let mut trees: BTreeMap<&Path, Vec<Merge>> = BTreeMap::new();
    for merge in merges {
        // The lowest layer that the tree had at the start, whatever is merged meanwhile.
        let root = forest.layers.get_key_value(forest.root(merge.member())).map(|(root, _)| root.as_path());
        trees.entry(root.unwrap_or(Path::new(""))).or_default().push(merge);
    }
    let named = |root: &Path| name_of_tree(forest, root, heads, known);
    trees.into_iter().map(|(root, merges)| DiskMerges { disk: named(root), merges }).collect()
}

fn name_of_tree(forest: &Forest, root: &Path, heads: &[(DiskName, PathBuf)], known: &History) -> DiskName {
    let head = heads.iter().find(|(_, path)| forest.root(path) == root).map(|(disk, _)| disk);
    let recorded =
        || known.layers().find(|(_, layer)| forest.root(&layer.path) == root).map(|(_, l)| &l.disk);
    head.or_else(recorded).cloned().unwrap_or_else(|| DiskName::new(&root.display().to_string()))
}

/// Marks those of the snapshots as deleted that are not yet.
pub(super) fn mark_deleted(history: &mut History, going: &[Going], now: Timestamp) {
    for snapshot in &mut history.snapshots {
        if going.iter().any(|going| going.id == snapshot.id) {
            snapshot.deleted.get_or_insert(now);
        }
    }
}
