//! A disk's history by its files: each record leads from a layer to the overlay that took its place.
//!
//! Names are no guide to it. QEMU calls a drive without an id by its top node, which is another one after
//! each snapshot; users add aliases; clocks are set back. The files stay.

use std::path::Path;

use model::{History, LayerRecord, SnapshotRecord};
use vm::disks::{Content, Disk};

/// The layer in which the disk went on whose layer `path` is or was: `path` itself if nothing is known of it.
pub fn went_on_in<'a>(known: &'a History, path: &'a Path) -> &'a Path {
    let mut active = path;
    // No path leads to itself in what snapctl records; a bound is cheaper than trust.
    for _ in 0..known.layers().count() {
        match known.layers().rfind(|(_, layer)| layer.path == active) {
            Some((_, layer)) => active = &layer.overlay,
            None => break,
        }
    }
    // The first image may be merged away; its head remembers it.
    let first = || known.heads.iter().rfind(|head| head.image == path).map(|head| head.path.as_path());
    if active == path && known.head(path).is_none() { first().unwrap_or(path) } else { active }
}

/// The recorded layers that the disk was on before the one at `path`, newest first.
pub(crate) fn came_from<'a>(known: &'a History, path: &Path) -> Vec<(&'a SnapshotRecord, &'a LayerRecord)> {
    let mut before: Vec<(&SnapshotRecord, &LayerRecord)> = Vec::new();
    let bound = known.layers().count();
    let mut next = path;
    while before.len() < bound {
        let leads_here = |(_, layer): &(&SnapshotRecord, &LayerRecord)| layer.overlay == next;
        // The disk was never on a copy; that lies beside the layer which it was on.
        before.extend(known.layers().rev().filter(leads_here).filter(|(_, layer)| layer.copied.is_some()));
        match known.layers().filter(|(_, layer)| layer.copied.is_none()).rfind(leads_here) {
            Some(found) => {
                before.push(found);
                next = &found.1.path;
            }
            None => break,
        }
    }
    before
}

/// The snapshots on which the layer at `path` stands, newest first, each with its layer of this disk. Those
/// of another branch are not among them.
pub(crate) fn stands_on<'a>(known: &'a History, path: &Path) -> Vec<(&'a SnapshotRecord, &'a LayerRecord)> {
    let of_disk = came_from(known, path);
    let mut below: Vec<(&SnapshotRecord, &LayerRecord)> = Vec::new();
    let mut parent = known.head(path).and_then(|head| head.parent);
    // Each disk has parents of its own; where its layer is merged away, no more is known.
    while let Some(found) = of_disk.iter().find(|(snapshot, _)| Some(snapshot.id) == parent)
        && below.len() < of_disk.len()
    {
        below.push(*found);
        parent = found.1.parent;
    }
    below
}

/// Gives each running disk the name that it was recorded under, unless the user gave it an alias, and lets
/// every name that it ever had find it.
pub(crate) fn name_by_history(disks: &mut [Disk], known: &History) {
    for disk in disks {
        let Content::Layer(layer) = &disk.content else { continue };
        // A VM on a stale layer is the same disk all the same.
        let active = went_on_in(known, &layer.path);
        let head = known.head(active);
        if let Some(head) = head.filter(|_| !disk.aliased) {
            disk.name = head.disk.clone();
        }
        let recorded = names_of(known, active);
        let all: Vec<String> =
            std::iter::once(disk.name.to_string()).chain(disk.names.drain(..)).chain(recorded).collect();
        for name in all {
            if !disk.names.contains(&name) {
                disk.names.push(name);
            }
        }
    }
}

/// The names under which the disk with this active layer was recorded, newest first.
pub(crate) fn names_of(known: &History, active: &Path) -> Vec<String> {
    let head = known.head(active).map(|head| head.disk.to_string());
    let recorded = came_from(known, active).into_iter().map(|(_, layer)| layer.disk.to_string());
    let mut names: Vec<String> = head.into_iter().chain(recorded).collect();
    let mut seen = std::collections::HashSet::new();
    names.retain(|name| seen.insert(name.clone()));
    names
}

#[cfg(test)]
mod tests {

    use std::path::PathBuf;

    use jiff::Timestamp;
    use model::{ByteSize, DiskName, ImageFormat, SnapshotId};
    use vm::disks::{ActiveLayer, NodeOptions};

    use super::*;

    fn record(bits: u64, disk: &str, path: &str, overlay: &str) -> SnapshotRecord {
        SnapshotRecord {
            disks: vec![LayerRecord::new(
                DiskName::new(disk),
                path.into(),
                ImageFormat::Qcow2,
                overlay.into(),
                ByteSize(1),
            )],
            ..SnapshotRecord::new(
                SnapshotId::from_bits(bits),
                "vm1".parse().unwrap(),
                format!("s{bits}").parse().unwrap(),
                Timestamp::UNIX_EPOCH,
            )
        }
    }

    fn history(records: impl IntoIterator<Item = SnapshotRecord>) -> History {
        let mut history = History::default();
        records.into_iter().for_each(|record| history.enter(record));
        history
    }

    /// A drive without an id, as it was called before each of its snapshots.
    fn known() -> History {
        history([
            record(1, "d0", "/i/a", "/i/a.1"),
            record(2, "s1-0", "/i/a.1", "/i/a.2"),
            record(3, "x", "/i/b", "/i/b.1"),
        ])
    }

    fn running(path: &str, aliased: bool) -> Disk {
        let layer = ActiveLayer {
            node: "s2-0".into(),
            format: ImageFormat::Qcow2,
            path: path.into(),
            virtual_size: ByteSize(1),
            options: NodeOptions { detect_zeroes: "off".into(), ..NodeOptions::default() },
            bitmaps: Vec::new(),
            nodes: vec!["s2-0".into()],
            below: Vec::new(),
        };
        let names = vec!["s2-0".into()];
        Disk { name: DiskName::new("s2-0"), names, aliased, content: Content::Layer(layer) }
    }

    #[test]
    fn q5_a_history_is_followed_by_its_files_whatever_the_disk_was_called() {
        let known = known();
        for path in ["/i/a", "/i/a.1", "/i/a.2"] {
            assert_eq!(went_on_in(&known, Path::new(path)), Path::new("/i/a.2"));
        }
        assert_eq!(went_on_in(&known, Path::new("/elsewhere")), Path::new("/elsewhere"));
        let below: Vec<&PathBuf> =
            came_from(&known, Path::new("/i/a.2")).iter().map(|(_, layer)| &layer.path).collect();
        assert_eq!(below, [Path::new("/i/a.1"), Path::new("/i/a")]);
        assert_eq!(known.holder(Path::new("/i/a")).unwrap().name.as_str(), "s1");
    }

    #[test]
    fn an_image_that_was_merged_away_still_leads_to_its_disk() {
        let mut known = history([record(1, "d0", "/i/a", "/i/a.1")]);
        known.snapshots[0].deleted = Some(Timestamp::UNIX_EPOCH);
        known.forget_deleted(Path::new("/i/a"));
        assert!(known.snapshots.is_empty());
        assert_eq!(went_on_in(&known, Path::new("/i/a")), Path::new("/i/a.1"));
        assert_eq!(names_of(&known, Path::new("/i/a.1")), ["d0"]);
    }

    #[test]
    fn a_branch_that_was_left_is_no_ground() {
        let mut known = history([record(1, "a", "/i/a", "/i/a.1"), record(2, "a", "/i/a.1", "/i/a.2")]);
        known.snapshots[1].parent = Some(SnapshotId::from_bits(1));
        known.heads[0].parent = Some(SnapshotId::from_bits(1));
        let below: Vec<&str> =
            stands_on(&known, Path::new("/i/a.2")).iter().map(|(s, _)| s.name.as_str()).collect();
        assert_eq!(below, ["s1"]);
        assert_eq!(came_from(&known, Path::new("/i/a.2")).len(), 2);
    }

    #[test]
    fn a_running_disk_keeps_its_recorded_name_and_answers_to_all() {
        let mut disks = [running("/i/a.2", false), running("/i/a.2", true), running("/new", false)];
        name_by_history(&mut disks, &known());
        assert_eq!(disks[0].names, ["s1-0", "s2-0", "d0"]);
        assert_eq!(disks[1].names, ["s2-0", "s1-0", "d0"]);
        assert_eq!(disks[2].names, ["s2-0"]);
        let loops = history([record(1, "a", "/i/a", "/i/b"), record(2, "a", "/i/b", "/i/a")]);
        name_by_history(&mut [running("/i/a", false)], &loops);
    }
}
