//! Looking at a VM's disks, chains and snapshots. Nothing here changes anything.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use model::{ByteSize, DiskName, Head, History, ImageFormat, LayerRecord, Name, SnapshotRecord};
use serde::Serialize;
use storage::chain::{Chain, ChainPolicy, Finding, Layer, Severity, check};
use storage::seal;
use vm::Machine;
use vm::disks::{Content, Disk};

use crate::error::Error;
use crate::lineage::{name_by_history, names_of, stands_on, went_on_in};
use crate::merge::refuse_other_chain;
use crate::platform;

/// One disk with its chain.
#[derive(Clone, Debug, Serialize)]
pub struct DiskView {
    /// The disk.
    pub disk: DiskName,
    /// Every name that finds it.
    pub names: Vec<String>,
    /// Why snapshots leave it out, if they do.
    pub left_out: Option<String>,
    /// Its layers, base first, active layer last; none if it has no image.
    pub layers: Vec<LayerView>,
    /// What stands beside that chain: layers of snapshots that one can go back to.
    pub branches: Vec<BranchView>,
    /// Why the chain cannot be followed, if it cannot.
    pub fault: Option<String>,
    /// The layer that the disk has gone on in, if the VM runs on one that a snapshot holds: the next start has
    /// to use this one.
    pub went_on_in: Option<PathBuf>,
}

/// One layer of a chain.
#[derive(Clone, Debug, Serialize)]
pub struct LayerView {
    /// The image.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// What the guest sees.
    pub virtual_size: ByteSize,
    /// What it takes on its file system.
    pub allocated: ByteSize,
    /// Whether the guest writes to it, or would.
    pub active: bool,
    /// Whether it is sealed against writing.
    pub sealed: bool,
    /// The snapshot whose point it holds.
    pub snapshot: Option<Name>,
    /// Snapshots that lie inside it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub inside: Vec<Name>,
    /// Whether the user protects it.
    pub protected: bool,
    /// When that was taken.
    pub created: Option<Timestamp>,
}

/// Layers beside a disk's active chain.
#[derive(Clone, Debug, Serialize)]
pub struct BranchView {
    /// The layer on which they stand, in the chain or in another branch; none if they stand alone.
    pub on: Option<PathBuf>,
    /// The layers, lowest first.
    pub layers: Vec<LayerView>,
}

impl DiskView {
    /// The layer that the guest writes to, or would.
    pub fn active(&self) -> Option<&LayerView> {
        self.layers.last().filter(|layer| layer.active)
    }

    /// The layers of the chain and of every branch.
    pub fn all_layers(&self) -> impl Iterator<Item = &LayerView> {
        self.layers.iter().chain(self.branches.iter().flat_map(|branch| &branch.layers))
    }
}

/// A disk's active layer, from whoever knows it best.
struct Active {
    disk: DiskName,
    names: Vec<String>,
    image: Result<(PathBuf, ImageFormat), String>,
}

/// The disks of a VM with their chains: as QEMU has them if it runs, as the catalogue remembers them if
/// not.
pub fn disk_views(machine: Option<&Machine>, known: &History) -> Vec<DiskView> {
    let policy = policy(known);
    let mut views: Vec<DiskView> =
        actives(machine, known).into_iter().map(|active| disk_view(active, known, &policy)).collect();
    // Those of the newest snapshots first: their chains hold the layers of older ones.
    for (_, layer) in known.layers().rev() {
        add_branch(&mut views, layer, known, &policy);
    }
    views
}

/// Shows a snapshot's layer, and what it stands on, if nothing shows it yet.
fn add_branch(views: &mut [DiskView], layer: &LayerRecord, known: &History, policy: &ChainPolicy) {
    let shown = |views: &[DiskView], path: &Path| {
        views.iter().any(|view| view.all_layers().any(|shown| shown.path == path))
    };
    if shown(views, &layer.path) {
        return;
    }
    let Ok(chain) = Chain::open(&layer.path, layer.format, policy) else { return };
    let new: Vec<LayerView> = chain
        .layers()
        .filter(|layer| !shown(views, &layer.path))
        .map(|layer| layer_view(layer, false, known))
        .collect();
    let lowest = new.first().and_then(|lowest| chain.layers().find(|layer| layer.path == lowest.path));
    let on = lowest.and_then(|lowest| lowest.backing.as_ref()).map(|backing| backing.path.clone());
    let stands_on = |view: &DiskView| on.as_ref().is_some_and(|on| view.all_layers().any(|l| l.path == *on));
    let went_on = went_on_in(known, &layer.path);
    let at = views.iter().position(stands_on).or_else(|| {
        views.iter().position(|view| view.layers.last().is_some_and(|active| active.path == went_on))
    });
    if let Some(view) = at.and_then(|at| views.get_mut(at)) {
        view.branches.push(BranchView { on, layers: new });
    }
}

/// Everything that a person should know about a VM's chains. Empty if all is well.
///
/// `views` are what [`disk_views`] gives for the same VM.
pub fn check_chains(machine: Option<&Machine>, known: &History, views: &[DiskView]) -> Vec<Finding> {
    let policy = policy(known);
    let mut findings = Vec::new();
    for active in actives(machine, known) {
        let Ok((path, format)) = &active.image else { continue };
        findings.extend(check(path, *format, &policy));
        findings.extend(stale_layer(&active, path, known));
        findings.extend(lost_layers(&active, path, *format, known, &policy));
    }
    findings.extend(machine.iter().flat_map(|machine| other_chains(machine, known, &policy)));
    findings.extend(lost_beside(known));
    findings.extend(lost_copies(known));
    // Branches stand on layers that were judged with the chain.
    for layer in views.iter().flat_map(|view| &view.branches).filter_map(|branch| branch.layers.last()) {
        let mut new = check(&layer.path, layer.format, &policy);
        new.retain(|finding| !findings.contains(finding));
        findings.extend(new);
    }
    findings
}

/// Finds a snapshot by its name, its id, a unique prefix of either, or `latest`.
///
/// # Errors
/// [`Error::NoSuchSnapshot`]; [`Error::Ambiguous`].
pub fn find_snapshot<'a>(vm: &Name, known: &'a History, wanted: &str) -> Result<&'a SnapshotRecord, Error> {
    let none = || Error::NoSuchSnapshot {
        vm: vm.clone(),
        wanted: wanted.to_owned(),
        known: known.visible().map(|snapshot| snapshot.name.clone()).collect(),
    };
    // A name that somebody gave wins over what it may also mean.
    let exact = |s: &&SnapshotRecord| s.name.as_str() == wanted || s.id.to_string() == wanted;
    if let Some(snapshot) = known.visible().find(exact) {
        return Ok(snapshot);
    }
    if wanted == "latest" {
        return known.visible().last().ok_or_else(none);
    }
    let starts =
        |s: &&SnapshotRecord| s.name.as_str().starts_with(wanted) || s.id.to_string().starts_with(wanted);
    let matches: Vec<_> = known.visible().filter(starts).filter(|_| !wanted.is_empty()).collect();
    match matches.as_slice() {
        [] => Err(none()),
        [one] => Ok(one),
        several => Err(Error::Ambiguous {
            vm: vm.clone(),
            wanted: wanted.to_owned(),
            matches: several.iter().map(|snapshot| snapshot.name.clone()).collect(),
        }),
    }
}

fn actives(machine: Option<&Machine>, known: &History) -> Vec<Active> {
    match machine {
        Some(machine) => {
            let mut disks = machine.disks.clone();
            name_by_history(&mut disks, known);
            disks.iter().map(running).collect()
        }
        None => remembered(known),
    }
}

fn running(disk: &Disk) -> Active {
    let image = match &disk.content {
        Content::Layer(layer) => Ok((layer.path.clone(), layer.format)),
        Content::Skipped(skip) => Err(skip.as_str().to_owned()),
        Content::Unfit(why) => Err(why.clone()),
    };
    Active { disk: disk.name.clone(), names: disk.names.clone(), image }
}

/// Each disk's active layer as it was when it changed last.
fn remembered(known: &History) -> Vec<Active> {
    let of_head = |head: &Head| Active {
        disk: head.disk.clone(),
        names: names_of(known, &head.path),
        image: Ok((head.path.clone(), head.format)),
    };
    known.heads.iter().map(of_head).collect()
}

/// Layers may lie where the catalogue knows some, and are as old as the points that froze them.
pub(crate) fn policy(known: &History) -> ChainPolicy {
    let mut allowed: Vec<PathBuf> =
        known.layers().filter_map(|(_, layer)| layer.path.parent().map(Path::to_owned)).collect();
    allowed.sort();
    allowed.dedup();
    let last_change =
        |snapshot: &SnapshotRecord, layer: &LayerRecord| layer.changed.unwrap_or(snapshot.created);
    let last_changes: BTreeMap<PathBuf, Timestamp> =
        known.layers().map(|(snapshot, layer)| (layer.path.clone(), last_change(snapshot, layer))).collect();
    ChainPolicy { allowed, last_changes }
}

fn disk_view(active: Active, known: &History, policy: &ChainPolicy) -> DiskView {
    let Active { disk, names, image } = active;
    let none = |left_out, fault| DiskView {
        disk: disk.clone(),
        names: names.clone(),
        left_out,
        layers: Vec::new(),
        branches: Vec::new(),
        fault,
        went_on_in: None,
    };
    let (path, format) = match image {
        Ok(image) => image,
        Err(why) => return none(Some(why), None),
    };
    let chain = match Chain::open(&path, format, policy) {
        Ok(chain) => chain,
        Err(fault) => return none(None, Some(fault.to_string())),
    };
    let views = chain.layers().map(|layer| layer_view(layer, layer.inode == chain.active().inode, known));
    let layers = views.collect();
    let went_on_in = known.holder(&path).map(|_| went_on_in(known, &path).to_owned());
    DiskView { disk, names, left_out: None, layers, branches: Vec::new(), fault: None, went_on_in }
}

fn layer_view(layer: &Layer, active: bool, known: &History) -> LayerView {
    let holds = known.holder(&layer.path);
    LayerView {
        path: layer.path.clone(),
        format: layer.format,
        virtual_size: layer.virtual_size,
        allocated: layer.allocated,
        active,
        sealed: seal::is_sealed(&layer.path).unwrap_or(false),
        snapshot: holds.filter(|s| s.deleted.is_none()).map(|snapshot| snapshot.name.clone()),
        inside: inside(known, &layer.path),
        protected: holds.is_some_and(|snapshot| snapshot.protected),
        created: holds.map(|snapshot| snapshot.created),
    }
}

/// Disks of which QEMU has other layers open than the files' headers name.
fn other_chains(machine: &Machine, known: &History, policy: &ChainPolicy) -> Vec<Finding> {
    let mut disks = machine.disks.clone();
    name_by_history(&mut disks, known);
    let differs = |disk: &Disk| {
        let layer = disk.layer()?;
        let chain = Chain::open(&layer.path, layer.format, policy).ok()?;
        let refusal = refuse_other_chain(disk, layer, &chain).err()?;
        Some(Finding {
            severity: Severity::Error,
            path: layer.path.clone(),
            code: "other-chain",
            message: refusal.to_string(),
            advice: "layers were merged or files changed by another tool; until the VM starts again nothing is merged here",
        })
    };
    disks.iter().filter_map(differs).collect()
}

/// The snapshots that lie inside the image at `path`.
fn inside(known: &History, path: &Path) -> Vec<Name> {
    let is_inside = |snapshot: &&SnapshotRecord| {
        snapshot.internal.as_ref().is_some_and(|internal| internal.disks.iter().any(|disk| disk.path == path))
    };
    known.visible().filter(is_inside).map(|snapshot| snapshot.name.clone()).collect()
}

/// The active layer is one that a snapshot holds: the VM was started on an old path.
fn stale_layer(active: &Active, path: &Path, known: &History) -> Option<Finding> {
    let snapshot = known.holder(path)?;
    let newest = went_on_in(known, path).display();
    Some(Finding {
        severity: Severity::Error,
        path: path.to_owned(),
        code: "stale-layer",
        message: format!(
            "the VM runs on this layer, which holds snapshot {}; disk {} went on in {newest}",
            snapshot.name, active.disk
        ),
        advice: "stop the VM at once and start it on the path that 'snapctl disk path' prints",
    })
}

/// Layers that the catalogue knows and the chain does not have.
fn lost_layers(
    active: &Active,
    path: &Path,
    format: ImageFormat,
    known: &History,
    policy: &ChainPolicy,
) -> Vec<Finding> {
    let Ok(chain) = Chain::open(path, format, policy) else { return Vec::new() };
    // A copy stands beside the chain.
    let in_chain =
        |layer: &LayerRecord| layer.copied.is_some() || chain.layers().any(|known| known.path == layer.path);
    let lost = stands_on(known, path).into_iter().filter(|(_, layer)| !in_chain(layer));
    lost.map(|(snapshot, layer)| Finding {
        severity: Severity::Error,
        path: layer.path.clone(),
        code: "lost-layer",
        message: format!(
            "it holds disk {} of snapshot {}, and is not in the chain",
            active.disk, snapshot.name
        ),
        advice: "the chain was changed by another tool; check whether the file is still there",
    })
    .collect()
}

/// Copies of disks that the catalogue knows and that are not there.
fn lost_copies(known: &History) -> impl Iterator<Item = Finding> {
    let copies =
        known.layers().filter(|(snapshot, layer)| snapshot.deleted.is_none() && layer.copied.is_some());
    copies.filter(|(_, layer)| !layer.path.exists()).map(|(snapshot, layer)| Finding {
        severity: Severity::Error,
        path: layer.path.clone(),
        code: "lost-layer",
        message: format!("it holds disk {} of snapshot {}, and is not there", layer.disk, snapshot.name),
        advice: "a file was removed by another tool, or a volume is not active: 'snapctl pool start' activates it",
    })
}

/// Files beside the layers that the catalogue knows and that are not there.
fn lost_beside(known: &History) -> impl Iterator<Item = Finding> {
    let files = known
        .visible()
        .flat_map(|snapshot| platform::beside(snapshot).into_iter().map(move |path| (snapshot, path)));
    files.filter(|(_, path)| !path.exists()).map(|(snapshot, path)| Finding {
        severity: Severity::Error,
        message: format!("it belongs to snapshot {}, and is not there", snapshot.name),
        code: if snapshot.memory.as_ref().is_some_and(|memory| memory.path == path) {
            "lost-memory"
        } else {
            "lost-copy"
        },
        path,
        advice: "the snapshot's disks are as they were: a guest that starts from them boots",
    })
}

#[cfg(test)]
mod tests {
    use model::SnapshotId;

    use super::*;

    fn known() -> History {
        let record = |bits: u64, name: &str| {
            SnapshotRecord::new(
                SnapshotId::from_bits(bits),
                "vm1".parse().unwrap(),
                name.parse().unwrap(),
                Timestamp::UNIX_EPOCH,
            )
        };
        let snapshots = vec![
            record(0xabc1 << 48, "daily-1"),
            record(0xabd2 << 48, "daily-10"),
            record(0xdead << 48, "latest-one"),
        ];
        History { snapshots, heads: Vec::new() }
    }

    fn find(wanted: &str) -> Result<String, Error> {
        find_snapshot(&"vm1".parse().unwrap(), &known(), wanted).map(|found| found.name.to_string())
    }

    #[test]
    fn snapshots_are_found_by_name_id_prefix_and_latest() {
        assert_eq!(find("daily-1").unwrap(), "daily-1");
        assert_eq!(find("daily-10").unwrap(), "daily-10");
        assert_eq!(find("lat").unwrap(), "latest-one");
        assert_eq!(find("latest").unwrap(), "latest-one");
        assert_eq!(find("abd").unwrap(), "daily-10");
        assert_eq!(find("abc1000000000000").unwrap(), "daily-1");
        assert!(matches!(find("d"), Err(Error::Ambiguous { matches, .. }) if matches.len() == 3));
        assert!(matches!(find("x"), Err(Error::NoSuchSnapshot { known, .. }) if known.len() == 3));
        assert!(matches!(find(""), Err(Error::NoSuchSnapshot { .. })));
    }
}
