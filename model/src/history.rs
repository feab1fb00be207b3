//! What is remembered of a VM: its points in time, and where each disk went on.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{DiskName, Fingerprint, ImageFormat, LayerRecord, Name, SnapshotId, SnapshotRecord};

/// One disk's active layer, as it was when it changed last: where a VM that does not run goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The VM.
    pub vm: Name,
    /// The disk, as the user knew it then.
    pub disk: DiskName,
    /// The image that the disk began with, as far as is known. It may be gone.
    pub image: PathBuf,
    /// The active layer.
    pub path: PathBuf,
    /// The format of `path`.
    pub format: ImageFormat,
    /// The snapshot on which the active layer stands, if any.
    pub parent: Option<SnapshotId>,
}

/// The snapshots and the heads of one VM, or of all.
///
/// For each disk the records lead through time: from the layer that holds a point to the one in which the
/// disk went on, and at the end to its head. What stands on what is another question, and the files' headers
/// answer it: after a revert the two differ.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// Every record, deleted ones too, in the order in which they were entered: clocks are set back.
    pub snapshots: Vec<SnapshotRecord>,
    /// The heads.
    pub heads: Vec<Head>,
}

impl History {
    /// That of one VM.
    pub fn of(&self, vm: &Name) -> Self {
        let snapshots = self.snapshots.iter().filter(|snapshot| snapshot.vm == *vm).cloned();
        let heads = self.heads.iter().filter(|head| head.vm == *vm).cloned();
        Self { snapshots: snapshots.collect(), heads: heads.collect() }
    }

    /// The snapshots that a user sees.
    pub fn visible(&self) -> impl DoubleEndedIterator<Item = &SnapshotRecord> {
        self.snapshots.iter().filter(|snapshot| snapshot.deleted.is_none())
    }

    /// The snapshot before `snapshot` that a user sees.
    pub fn visible_parent(&self, snapshot: &SnapshotRecord) -> Option<&SnapshotRecord> {
        let find = |id: SnapshotId| self.snapshots.iter().find(|other| other.id == id);
        let mut parent = find(snapshot.parent?)?;
        for _ in 0..self.snapshots.len() {
            if parent.deleted.is_none() {
                return Some(parent);
            }
            parent = find(parent.parent?)?;
        }
        None
    }

    /// Every recorded layer with its snapshot, oldest snapshot first.
    pub fn layers(&self) -> impl DoubleEndedIterator<Item = (&SnapshotRecord, &LayerRecord)> {
        self.snapshots.iter().flat_map(|snapshot| snapshot.disks.iter().map(move |layer| (snapshot, layer)))
    }

    /// The newest record that holds the layer at `path`.
    pub fn holder(&self, path: &Path) -> Option<&SnapshotRecord> {
        self.layers().rfind(|(_, layer)| layer.path == path).map(|(snapshot, _)| snapshot)
    }

    /// The head whose active layer is `path`.
    pub fn head(&self, path: &Path) -> Option<&Head> {
        self.heads.iter().rfind(|head| head.path == path)
    }

    /// Enters a snapshot, and moves the heads of its disks to their overlays. One inside the images, or beside them, leaves
    /// heads where they are.
    pub fn enter(&mut self, mut snapshot: SnapshotRecord) {
        for layer in &mut snapshot.disks {
            layer.parent = self.head(layer.was_active()).and_then(|head| head.parent);
        }
        for layer in &snapshot.disks {
            let next = |image: &Path| Head {
                vm: snapshot.vm.clone(),
                disk: layer.disk.clone(),
                image: image.to_owned(),
                path: layer.overlay.clone(),
                format: if layer.copied.is_some() { layer.format } else { ImageFormat::Qcow2 },
                parent: Some(snapshot.id),
            };
            let was_active = layer.was_active();
            match self.heads.iter_mut().rfind(|head| head.path == *was_active) {
                Some(head) => *head = next(&head.image),
                None => self.heads.push(next(was_active)),
            }
        }
        for disk in snapshot.internal.iter().flat_map(|internal| &internal.disks) {
            if self.head(&disk.path).is_none() {
                self.heads.push(Head {
                    vm: snapshot.vm.clone(),
                    disk: disk.disk.clone(),
                    image: disk.path.clone(),
                    path: disk.path.clone(),
                    format: ImageFormat::Qcow2,
                    parent: None,
                });
            }
        }
        self.snapshots.push(snapshot);
    }

    /// Lets `new` take the place of the layer `old`, which is going away: wherever a record or a head names
    /// it. A deleted record that then leads from a layer to itself has nothing more to tell.
    pub fn replace(&mut self, old: &Path, new: &Path, format: ImageFormat, sealed_mode: Option<u32>) {
        for layer in self.snapshots.iter_mut().flat_map(|snapshot| &mut snapshot.disks) {
            if layer.path == old {
                layer.path = new.to_owned();
                layer.format = format;
                layer.sealed_mode = sealed_mode;
                layer.fingerprint = None;
            }
            if layer.overlay == old {
                layer.overlay = new.to_owned();
            }
        }
        for head in self.heads.iter_mut().filter(|head| head.path == old) {
            head.path = new.to_owned();
            head.format = format;
        }
    }

    /// Notes that the layer at `path` was changed rightfully at `when`, and reads as before.
    pub fn note_change(&mut self, path: &Path, when: Timestamp) {
        for layer in self.layers_at_mut(path) {
            (layer.changed, layer.fingerprint) = (Some(when), None);
        }
    }

    /// The fingerprint of the layer at `path`, if it is known.
    pub fn fingerprint(&self, path: &Path) -> Option<&Fingerprint> {
        self.layers().rfind(|(_, layer)| layer.path == path)?.1.fingerprint.as_ref()
    }

    /// Keeps what the frozen layer at `path` is from now on.
    pub fn note_fingerprint(&mut self, path: &Path, fingerprint: &Fingerprint) {
        for layer in self.layers_at_mut(path) {
            layer.fingerprint = Some(fingerprint.clone());
        }
    }

    fn layers_at_mut(&mut self, path: &Path) -> impl Iterator<Item = &mut LayerRecord> {
        let layers = self.snapshots.iter_mut().flat_map(|snapshot| &mut snapshot.disks);
        layers.filter(move |layer| layer.path == path)
    }

    /// Drops the layer at `path` from deleted records, and records of which nothing is left. What stood on
    /// such a snapshot stands on the one before it.
    pub fn forget_deleted(&mut self, path: &Path) {
        let mut dropped: Vec<(SnapshotId, LayerRecord)> = Vec::new();
        for snapshot in self.snapshots.iter_mut().filter(|snapshot| snapshot.deleted.is_some()) {
            let gone = snapshot.disks.extract_if(.., |layer| layer.path == path);
            dropped.extend(gone.map(|layer| (snapshot.id, layer)));
        }
        for (id, gone) in dropped {
            let layers = self.snapshots.iter_mut().flat_map(|snapshot| &mut snapshot.disks);
            let layers = layers.map(|layer| (&layer.disk, &mut layer.parent));
            let heads = self.heads.iter_mut().map(|head| (&head.disk, &mut head.parent));
            for (disk, parent) in layers.chain(heads) {
                if *parent == Some(id) && *disk == gone.disk {
                    *parent = gone.parent;
                }
            }
        }
        self.drop_empty();
    }

    /// Drops deleted records of which nothing is left. What stood on such a snapshot stands on the one before it.
    pub fn drop_empty(&mut self) {
        let is_gone = |snapshot: &SnapshotRecord| snapshot.deleted.is_some() && snapshot.disks.is_empty();
        while let Some(index) = self.snapshots.iter().position(is_gone) {
            let gone = self.snapshots.remove(index);
            let parents = self.snapshots.iter_mut().map(|snapshot| &mut snapshot.parent);
            for parent in parents.chain(self.heads.iter_mut().map(|head| &mut head.parent)) {
                if *parent == Some(gone.id) {
                    *parent = gone.parent;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::ByteSize;

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

    fn three() -> History {
        let mut history = History::default();
        history.enter(record(1, "/a", "/a.1", None));
        history.enter(record(2, "/a.1", "/a.2", Some(1)));
        history.enter(record(3, "/a.2", "/a.3", Some(2)));
        history
    }

    #[test]
    fn entering_snapshots_moves_one_head_and_keeps_its_first_image() {
        let history = three();
        assert_eq!(history.heads.len(), 1);
        let head = &history.heads[0];
        assert_eq!((head.image.as_path(), head.path.as_path()), (Path::new("/a"), Path::new("/a.3")));
        assert_eq!(head.parent, Some(SnapshotId::from_bits(3)));
    }

    #[test]
    fn a_layer_that_is_merged_away_leaves_a_history_without_a_gap() {
        let mut history = three();
        history.snapshots[1].deleted = Some(Timestamp::UNIX_EPOCH);
        // Committed down: what was in a.2 is in a.1 now.
        history.forget_deleted(Path::new("/a.1"));
        history.replace(Path::new("/a.2"), Path::new("/a.1"), ImageFormat::Qcow2, None);
        let edges: Vec<_> = history.layers().map(|(_, l)| (l.path.to_str(), l.overlay.to_str())).collect();
        assert_eq!(edges, [(Some("/a"), Some("/a.1")), (Some("/a.1"), Some("/a.3"))]);
        assert_eq!(history.snapshots[1].parent, Some(SnapshotId::from_bits(1)));
    }

    #[test]
    fn a_disk_that_was_flattened_stands_on_nothing_whatever_the_others_do() {
        let mut history = three();
        history.heads[0].parent = None;
        history.enter(record(4, "/a.3", "/a.4", Some(3)));
        history.enter(record(5, "/a.4", "/a.5", Some(4)));
        let parents = |history: &History| history.layers().map(|(_, layer)| layer.parent).collect::<Vec<_>>();
        let id = |bits| Some(SnapshotId::from_bits(bits));
        assert_eq!(parents(&history), [None, id(1), id(2), None, id(4)]);
        // What stood on the deleted one stands on what that stood on, disk by disk: on nothing.
        history.snapshots[3].deleted = Some(Timestamp::UNIX_EPOCH);
        history.forget_deleted(Path::new("/a.3"));
        assert_eq!(parents(&history), [None, id(1), id(2), None]);
        assert_eq!(history.snapshots[3].parent, id(3));
    }

    #[test]
    fn a_deleted_record_stays_until_the_last_of_its_layers_is_gone() {
        let mut history = three();
        history.snapshots[2].deleted = Some(Timestamp::UNIX_EPOCH);
        history.forget_deleted(Path::new("/elsewhere"));
        assert_eq!((history.snapshots.len(), history.visible().count()), (3, 2));
        history.forget_deleted(Path::new("/a.2"));
        assert_eq!(history.snapshots.len(), 2);
        assert_eq!(history.heads[0].parent, Some(SnapshotId::from_bits(2)));
    }
}
