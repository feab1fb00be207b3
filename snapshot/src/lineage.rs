//! A disk's history by its files: each record leads from a layer to the overlay that took its place.
//!
//! Names are no guide to it. QEMU calls a drive without an id by its top node, which is another one after
//! each snapshot; users add aliases; clocks are set back. The files stay.

use std::path::Path;

use model::{LayerRecord, SnapshotRecord};
use vm::disks::{Content, Disk};

/// Every layer that is recorded, oldest snapshot first, with its snapshot.
pub(crate) fn layers(
    known: &[SnapshotRecord],
) -> impl DoubleEndedIterator<Item = (&SnapshotRecord, &LayerRecord)> {
    known.iter().flat_map(|snapshot| snapshot.disks.iter().map(move |layer| (snapshot, layer)))
}

/// The newest snapshot that holds the layer at `path`.
pub(crate) fn holder<'a>(known: &'a [SnapshotRecord], path: &Path) -> Option<&'a SnapshotRecord> {
    layers(known).rfind(|(_, layer)| layer.path == path).map(|(snapshot, _)| snapshot)
}

/// The overlay in which the disk whose layer `path` is went on: `path` itself if no snapshot holds it.
pub fn went_on_in<'a>(known: &'a [SnapshotRecord], path: &'a Path) -> &'a Path {
    let mut active = path;
    // No path leads to itself in what snapctl records; a bound is cheaper than trust.
    for _ in 0..layers(known).count() {
        match layers(known).rfind(|(_, layer)| layer.path == active) {
            Some((_, layer)) => active = &layer.overlay,
            None => break,
        }
    }
    active
}

/// The recorded layers below the one at `path`, newest first.
pub(crate) fn came_from<'a>(
    known: &'a [SnapshotRecord],
    path: &Path,
) -> Vec<(&'a SnapshotRecord, &'a LayerRecord)> {
    let mut below: Vec<(&SnapshotRecord, &LayerRecord)> = Vec::new();
    let bound = layers(known).count();
    while below.len() < bound {
        let top = below.last().map_or(path, |(_, layer)| layer.path.as_path());
        match layers(known).rfind(|(_, layer)| layer.overlay == top) {
            Some(found) => below.push(found),
            None => break,
        }
    }
    below
}

/// Gives each running disk the name that it was recorded under, unless the user gave it an alias, and lets
/// every name that it ever had find it.
pub(crate) fn name_by_history(disks: &mut [Disk], known: &[SnapshotRecord]) {
    for disk in disks {
        let Content::Layer(layer) = &disk.content else { continue };
        // A VM on a stale layer is the same disk all the same.
        let history = came_from(known, went_on_in(known, &layer.path));
        if let Some((_, newest)) = history.first().filter(|_| !disk.aliased) {
            disk.name = newest.disk.clone();
        }
        let recorded = history.iter().map(|(_, layer)| layer.disk.to_string());
        let all: Vec<String> =
            std::iter::once(disk.name.to_string()).chain(disk.names.drain(..)).chain(recorded).collect();
        for name in all {
            if !disk.names.contains(&name) {
                disk.names.push(name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use jiff::Timestamp;
    use model::{ByteSize, Consistency, DiskName, ImageFormat, SnapshotId};
    use vm::disks::{ActiveLayer, NodeOptions};

    use super::*;

    fn record(bits: u64, disk: &str, path: &str, overlay: &str) -> SnapshotRecord {
        SnapshotRecord {
            id: SnapshotId::from_bits(bits),
            vm: "vm1".parse().unwrap(),
            name: format!("s{bits}").parse().unwrap(),
            created: Timestamp::UNIX_EPOCH,
            description: None,
            labels: BTreeMap::new(),
            consistency: Consistency::Crash,
            freeze: None,
            disks: vec![LayerRecord {
                disk: DiskName::new(disk),
                path: path.into(),
                format: ImageFormat::Qcow2,
                overlay: overlay.into(),
                virtual_size: ByteSize(1),
                sealed_mode: None,
            }],
            parent: None,
        }
    }

    /// A drive without an id, as it was called before each of its snapshots.
    fn known() -> Vec<SnapshotRecord> {
        vec![
            record(1, "d0", "/i/a", "/i/a.1"),
            record(2, "s1-0", "/i/a.1", "/i/a.2"),
            record(3, "x", "/i/b", "/i/b.1"),
        ]
    }

    fn running(path: &str, aliased: bool) -> Disk {
        let layer = ActiveLayer {
            node: "s2-0".into(),
            format: ImageFormat::Qcow2,
            path: path.into(),
            virtual_size: ByteSize(1),
            options: NodeOptions { direct: false, no_flush: false, detect_zeroes: "off".into() },
            nodes: vec!["s2-0".into()],
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
        assert_eq!(holder(&known, Path::new("/i/a")).unwrap().name.as_str(), "s1");
    }

    #[test]
    fn a_running_disk_keeps_its_recorded_name_and_answers_to_all() {
        let mut disks = [running("/i/a.2", false), running("/i/a.2", true), running("/new", false)];
        name_by_history(&mut disks, &known());
        assert_eq!(disks[0].names, ["s1-0", "s2-0", "d0"]);
        assert_eq!(disks[1].names, ["s2-0", "s1-0", "d0"]);
        assert_eq!(disks[2].names, ["s2-0"]);
        let loops = [record(1, "a", "/i/a", "/i/b"), record(2, "a", "/i/b", "/i/a")];
        name_by_history(&mut [running("/i/a", false)], &loops);
    }
}
