//! The layers of a VM's disks as a forest, and what there is to merge in it. Pure.
//!
//! A layer that no snapshot and no disk needs any more is *released*: its content is wanted only by what stands
//! on it. A run of released layers, each with a single overlay, ends below a layer that stays, and goes away in
//! one of two directions:
//!
//! ```text
//!   kept ─ r1 ─ r2 ─ K ─ …      up:   K takes what r1 and r2 hold, and stands on kept
//!                               down: r1 takes what r2 and K hold, and takes the place of K
//! ```
//!
//! Both leave the same data at every point that stays; the one that copies less is taken.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use model::{ByteSize, ImageFormat};
use serde::{Deserialize, Serialize};

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layer {
    pub format: ImageFormat,
    /// What a guest sees of it.
    pub virtual_size: u64,
    /// What it takes on its file system.
    pub allocated: u64,
    /// The file below.
    pub backing: Option<PathBuf>,
    pub role: Role,
    /// It holds snapshots inside, which read through its backing file too, or is a device: it neither goes away nor gets another
    /// backing file.
    pub pinned: bool,
    /// What stands on it and is not in the forest: it can neither change nor go.
    pub others: Vec<PathBuf>,
}

/// What a layer is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A guest writes to it: taking its place needs the guest to be held.
    Running,
    /// A guest will write to it at the next start.
    Active,
    /// A snapshot holds it, or nobody knows whose it is.
    Kept,
    /// Only deleted snapshots held it.
    Released,
}

/// One change of a chain of files. Every point that stays reads as before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "merge", rename_all = "kebab-case")]
pub enum Merge {
    /// What the layers above `base`, up to `top`, hold is copied down into it, and it takes the place of `top`.
    Commit {
        /// The highest layer; it goes away.
        top: PathBuf,
        /// The lowest one, which stays.
        base: PathBuf,
        /// Every layer that goes away, from the one above `base` up to `top`.
        gone: Vec<PathBuf>,
        /// The layer above `top`, if there is one.
        overlay: Option<PathBuf>,
        /// At most so much is copied.
        bytes: ByteSize,
    },
    /// What the layers below `into`, down to the one above `below`, hold is copied up into it.
    Stream {
        /// The layer that stays.
        into: PathBuf,
        /// The layers of which it becomes independent, lowest first.
        gone: Vec<PathBuf>,
        /// The layer on which it stands afterwards, if on any.
        below: Option<PathBuf>,
        /// Whether the layers in `gone` stay as files, for others to stand on.
        keep: bool,
        /// At most so much is copied.
        bytes: ByteSize,
    },
    /// Nothing stands on the layer, and its file is removed.
    Remove {
        /// The layer.
        path: PathBuf,
        /// What that frees.
        bytes: ByteSize,
    },
}

impl Merge {
    /// The layer that stays, and to which is written; none for a removal.
    pub fn survivor(&self) -> Option<&Path> {
        match self {
            Self::Commit { base, .. } => Some(base),
            Self::Stream { into, .. } => Some(into),
            Self::Remove { .. } => None,
        }
    }

    /// The files that are opened for writing: the survivor, the highest layer that is committed, and the overlay whose
    /// header gets another backing file.
    pub fn written(&self) -> impl Iterator<Item = &Path> {
        let (top, overlay) = match self {
            Self::Commit { top, overlay, .. } => (Some(top.as_path()), overlay.as_deref()),
            Self::Stream { .. } | Self::Remove { .. } => (None, None),
        };
        self.survivor().into_iter().chain(top).chain(overlay)
    }

    /// The layers that the disk does not stand on any more, lowest first.
    pub fn gone(&self) -> &[PathBuf] {
        match self {
            Self::Commit { gone, .. } | Self::Stream { gone, .. } => gone,
            Self::Remove { path, .. } => std::slice::from_ref(path),
        }
    }

    /// The files that go away.
    pub fn removed(&self) -> &[PathBuf] {
        match self {
            Self::Stream { keep: true, .. } => &[],
            other => other.gone(),
        }
    }

    /// Every file that it changes or that goes away.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.written().chain(self.removed().iter().map(PathBuf::as_path))
    }

    /// A layer that tells which disk it is about.
    pub fn member(&self) -> &Path {
        match self {
            Self::Commit { base, .. } => base,
            Self::Stream { into, .. } => into,
            Self::Remove { path, .. } => path,
        }
    }

    /// At most so much is copied.
    pub fn copied(&self) -> ByteSize {
        match self {
            Self::Commit { bytes, .. } | Self::Stream { bytes, .. } => *bytes,
            Self::Remove { .. } => ByteSize(0),
        }
    }
}

/// A released layer that has to stay for now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Staying {
    /// The layer.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

/// Layers by path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Forest {
    pub layers: BTreeMap<PathBuf, Layer>,
}

impl Forest {
    /// What is to be merged first, if anything is.
    pub fn next(&self) -> Option<Merge> {
        self.removal().or_else(|| self.layers.iter().find_map(|(path, layer)| self.below(path, layer)))
    }

    /// Everything that is to be merged, in order.
    pub fn all(mut self) -> (Vec<Merge>, Vec<Staying>) {
        let mut merges = Vec::new();
        while let Some(merge) = self.next() {
            self.apply(&merge);
            merges.push(merge);
        }
        (merges, self.staying())
    }

    /// What makes the layer at `into` stand on nothing; none if it does already.
    pub fn flatten(&self, into: &Path) -> Option<Merge> {
        let gone = self.chain_below(into);
        let bytes = self.at_most(gone.iter().copied(), into);
        let gone: Vec<PathBuf> = gone.into_iter().rev().map(Path::to_owned).collect();
        (!gone.is_empty()).then(|| Merge::Stream {
            into: into.to_owned(),
            gone,
            below: None,
            keep: true,
            bytes,
        })
    }

    /// What the forest is after the merge.
    pub fn apply(&mut self, merge: &Merge) {
        let copied = merge.copied().0;
        match merge {
            Merge::Commit { top, base, gone, overlay, .. } => {
                let Some(top) = self.layers.get(top).cloned() else { return };
                if let Some(base) = self.layers.get_mut(base) {
                    base.role = top.role;
                    base.virtual_size = top.virtual_size;
                    base.allocated = base.allocated.saturating_add(copied);
                }
                if let Some(overlay) = overlay.as_ref().and_then(|overlay| self.layers.get_mut(overlay)) {
                    overlay.backing = Some(base.clone());
                }
                gone.iter().for_each(|path| drop(self.layers.remove(path)));
            }
            Merge::Stream { into, gone, below, keep, .. } => {
                if let Some(into) = self.layers.get_mut(into) {
                    into.backing = below.clone();
                    into.allocated = into.allocated.saturating_add(copied);
                }
                if !keep {
                    gone.iter().for_each(|path| drop(self.layers.remove(path)));
                }
            }
            Merge::Remove { path, .. } => drop(self.layers.remove(path)),
        }
    }

    /// The lowest layer of the chain that `path` is in: the name of its tree.
    pub fn root<'a>(&'a self, path: &'a Path) -> &'a Path {
        self.chain_below(path).last().copied().unwrap_or(path)
    }

    /// The layers below `path`, nearest first.
    fn chain_below<'a>(&'a self, path: &Path) -> Vec<&'a Path> {
        let mut chain: Vec<&Path> = Vec::new();
        let mut next = self.layers.get(path).and_then(|layer| layer.backing.as_deref());
        // Chains that were read from files have no loop; a bound is cheaper than trust.
        while let Some(backing) = next.filter(|_| chain.len() < self.layers.len()) {
            chain.push(backing);
            next = self.layers.get(backing).and_then(|layer| layer.backing.as_deref());
        }
        chain
    }

    fn overlays<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a PathBuf> {
        let on_it = self.layers.iter().filter(move |(_, layer)| layer.backing.as_deref() == Some(path));
        let others = self.layers.get(path).into_iter().flat_map(|layer| &layer.others);
        on_it.map(|(overlay, _)| overlay).chain(others)
    }

    /// Whether the layer may be merged into the only one that stands on it.
    fn is_passing(&self, path: &Path) -> bool {
        let released = self.layers.get(path).is_some_and(|l| l.role == Role::Released && l.others.is_empty());
        released && self.overlays(path).count() == 1
    }

    fn removal(&self) -> Option<Merge> {
        let is_leaf = |(path, layer): &(&PathBuf, &Layer)| {
            layer.role == Role::Released && !layer.pinned && self.overlays(path).next().is_none()
        };
        let (path, layer) = self.layers.iter().find(is_leaf)?;
        Some(Merge::Remove { path: path.clone(), bytes: ByteSize(layer.allocated) })
    }

    /// How the run of passing layers below `path` goes away, if there is one and `path` itself stays.
    fn below(&self, path: &Path, layer: &Layer) -> Option<Merge> {
        if self.is_passing(path) || layer.pinned || !layer.others.is_empty() {
            return None;
        }
        let mut run = self.run_below(path);
        // One that may not go away can only take what the others hold.
        if run.last().is_some_and(|lowest| self.is_pinned(lowest) && !self.may_go_down(path, layer, lowest)) {
            run.pop();
        }
        let lowest = *run.last()?;
        let up = self.at_most(run.iter().copied(), path);
        let above_lowest = run.iter().copied().take(run.len() - 1).chain([path]);
        let down = self.at_most(above_lowest, lowest);
        if self.may_go_down(path, layer, lowest)
            && (self.is_pinned(lowest) || prefers_down(layer, up.0, down.0))
        {
            let gone = run.iter().rev().skip(1).copied().chain([path]).map(Path::to_owned).collect();
            let overlay = self.overlays(path).next().cloned();
            let (top, base) = (path.to_owned(), lowest.to_owned());
            return Some(Merge::Commit { top, base, gone, overlay, bytes: down });
        }
        let below = self.layers.get(lowest).and_then(|lowest| lowest.backing.clone());
        let gone = run.into_iter().rev().map(Path::to_owned).collect();
        Some(Merge::Stream { into: path.to_owned(), gone, below, keep: false, bytes: up })
    }

    /// The passing layers below `path`, nearest first; one that is pinned ends them.
    fn run_below<'a>(&'a self, path: &Path) -> Vec<&'a Path> {
        let mut run = Vec::new();
        for below in self.chain_below(path).into_iter().take_while(|below| self.is_passing(below)) {
            run.push(below);
            if self.is_pinned(below) {
                break;
            }
        }
        run
    }

    fn is_pinned(&self, path: &Path) -> bool {
        self.layers.get(path).is_some_and(|layer| layer.pinned)
    }

    /// The header of one overlay can be changed in the same step, not those of several; and a layer cannot
    /// shrink.
    fn may_go_down(&self, path: &Path, layer: &Layer, lowest: &Path) -> bool {
        let fits = self.layers.get(lowest).is_some_and(|lowest| lowest.virtual_size <= layer.virtual_size);
        fits && self.overlays(path).count() <= 1
    }

    /// At most so much is written when what `sources` hold is copied into `target`.
    fn at_most<'a>(&self, sources: impl Iterator<Item = &'a Path>, target: &Path) -> ByteSize {
        let held = sources.filter_map(|path| self.layers.get(path)).map(|layer| layer.allocated);
        let held = held.fold(0_u64, u64::saturating_add);
        let most = self.layers.get(target).map_or(u64::MAX, |target| target.virtual_size);
        ByteSize(held.min(most))
    }

    /// Released layers for which [`Forest::next`] can do nothing.
    fn staying(&self) -> Vec<Staying> {
        let released = self.layers.iter().filter(|(_, layer)| layer.role == Role::Released);
        let why = |path: &PathBuf, layer: &Layer| match layer.others.first() {
            Some(other) => {
                format!("{} stands or may stand on it, and is not one of this VM's", other.display())
            }
            None if layer.pinned => "it holds snapshots inside, or is a device".to_owned(),
            None => format!("{} layers stand on it", self.overlays(path).count()),
        };
        released.map(|(path, layer)| Staying { path: path.clone(), reason: why(path, layer) }).collect()
    }
}

/// Down if that copies less. Where it is about the same, up if a guest would have to be held otherwise; else down,
/// since QEMU copies several pieces at once in that direction.
fn prefers_down(layer: &Layer, up: u64, down: u64) -> bool {
    let about_the_same = up.abs_diff(down) <= up.max(down) / 16;
    if about_the_same { layer.role != Role::Running } else { down < up }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 8;

    /// a (pinned) ─ b: `b` goes down into it, whatever is cheaper; nothing else is done to a pinned layer.
    #[test]
    fn a_layer_with_snapshots_inside_neither_goes_away_nor_gets_another_backing_file() {
        let pinned = |backing, role| Layer { pinned: true, ..layer(backing, role, 1) };
        let forest = |layers: Vec<(&str, Layer)>| Forest {
            layers: layers.into_iter().map(|(path, layer)| (PathBuf::from(path), layer)).collect(),
        };
        let down =
            forest(vec![("/a", pinned(None, Role::Released)), ("/b", layer(Some("/a"), Role::Active, 900))]);
        let merge = down.next();
        assert!(matches!(&merge, Some(Merge::Commit { base, .. }) if base == Path::new("/a")), "{merge:?}");
        for stays in [
            vec![("/a", layer(None, Role::Released, 1)), ("/b", pinned(Some("/a"), Role::Active))],
            vec![("/a", pinned(None, Role::Released))],
            vec![("/a", pinned(None, Role::Released)), ("/b", pinned(Some("/a"), Role::Active))],
        ] {
            let (merges, staying) = forest(stays).all();
            assert!(merges.is_empty() && staying.len() == 1, "{merges:?} {staying:?}");
        }
    }

    fn layer(backing: Option<&str>, role: Role, allocated: u64) -> Layer {
        Layer {
            format: ImageFormat::Qcow2,
            virtual_size: SIZE << 30,
            allocated: allocated << 20,
            backing: backing.map(PathBuf::from),
            role,
            pinned: false,
            others: Vec::new(),
        }
    }

    fn forest(layers: &[(&str, Option<&str>, Role, u64)]) -> Forest {
        let layers = layers
            .iter()
            .map(|(path, backing, role, size)| (PathBuf::from(path), layer(*backing, *role, *size)));
        Forest { layers: layers.collect() }
    }

    #[test]
    fn the_direction_is_the_one_that_copies_less() {
        let with = |base, active| {
            forest(&[
                ("a", None, Role::Kept, 1),
                ("b", Some("a"), Role::Released, base),
                ("c", Some("b"), Role::Running, active),
            ])
        };
        let up = with(1, 4).next().unwrap();
        assert!(
            matches!(&up, Merge::Stream { into, below: Some(below), bytes: ByteSize(0x10_0000), .. }
            if into == Path::new("c") && below == Path::new("a")),
            "{up:?}"
        );
        let down = with(4, 1).next().unwrap();
        assert!(
            matches!(&down, Merge::Commit { top, base, overlay: None, bytes: ByteSize(0x10_0000), .. }
            if top == Path::new("c") && base == Path::new("b")),
            "{down:?}"
        );
        // Without holding a guest if it makes no difference, and the faster way where there is none to hold.
        assert!(matches!(with(20, 21).next().unwrap(), Merge::Stream { .. }));
        let mut stopped = with(20, 21);
        stopped.layers.get_mut(Path::new("c")).unwrap().role = Role::Active;
        assert!(matches!(stopped.next().unwrap(), Merge::Commit { .. }));
    }

    #[test]
    fn neighbours_go_in_one_pass() {
        let chain = [
            ("a", None, Role::Released, 3),
            ("b", Some("a"), Role::Released, 1),
            ("c", Some("b"), Role::Kept, 1),
            ("d", Some("c"), Role::Active, 1),
        ];
        let (merges, staying) = forest(&chain).all();
        let [Merge::Commit { top, base, gone, overlay, bytes }] = merges.as_slice() else {
            panic!("{merges:?}");
        };
        assert_eq!((top.to_str(), base.to_str(), bytes.0), (Some("c"), Some("a"), 2 << 20));
        assert_eq!(gone.iter().map(|path| path.to_str().unwrap()).collect::<Vec<_>>(), ["b", "c"]);
        assert_eq!(overlay.as_deref(), Some(Path::new("d")));
        assert!(staying.is_empty());
    }

    #[test]
    fn what_others_stand_on_stays_and_is_named() {
        let mut forest = forest(&[("a", None, Role::Released, 3), ("b", Some("a"), Role::Active, 1)]);
        forest.layers.get_mut(Path::new("a")).unwrap().others.push("clone".into());
        let (merges, staying) = forest.all();
        assert!(merges.is_empty());
        assert!(staying[0].reason.contains("clone"), "{staying:?}");
    }

    #[test]
    fn a_layer_that_is_larger_than_its_successor_is_not_committed_into() {
        let mut forest = forest(&[("a", None, Role::Released, 7), ("b", Some("a"), Role::Active, 1)]);
        forest.layers.get_mut(Path::new("a")).unwrap().virtual_size = (2 * SIZE) << 30;
        assert!(matches!(forest.next(), Some(Merge::Stream { .. })));
    }

    #[test]
    fn flattening_leaves_what_is_below_to_others() {
        let mut forest = forest(&[
            ("a", None, Role::Kept, 3),
            ("b", Some("a"), Role::Kept, 1),
            ("c", Some("b"), Role::Active, 1),
        ]);
        let merge = forest.flatten(Path::new("c")).unwrap();
        assert!(matches!(&merge, Merge::Stream { below: None, keep: true, bytes: ByteSize(0x40_0000), .. }));
        assert!(merge.removed().is_empty());
        forest.apply(&merge);
        assert_eq!(forest.flatten(Path::new("c")), None);
        assert_eq!(forest.next(), None);
    }

    /// What each layer itself holds: block to the layer's number.
    type Data = BTreeMap<PathBuf, BTreeMap<u8, usize>>;

    fn read(forest: &Forest, data: &Data, path: &Path, block: u8) -> Option<usize> {
        let found = data.get(path).and_then(|blocks| blocks.get(&block).copied());
        found.or_else(|| read(forest, data, forest.layers.get(path)?.backing.as_deref()?, block))
    }

    /// Copies as QEMU's jobs do.
    fn copy(forest: &Forest, data: &mut Data, merge: &Merge) {
        let from = |data: &Data, layers: &[PathBuf], block: u8| {
            layers.iter().rev().find_map(|layer| data[layer].get(&block).copied())
        };
        for block in 0..SIZE as u8 {
            match merge {
                Merge::Commit { base, gone, .. } => {
                    if let Some(found) = from(data, gone, block) {
                        data.get_mut(base).unwrap().insert(block, found);
                    }
                }
                Merge::Stream { into, gone, .. } => {
                    let found = from(data, gone, block);
                    let into = data.get_mut(into).unwrap();
                    if let Some(found) = found.filter(|_| !into.contains_key(&block)) {
                        into.insert(block, found);
                    }
                }
                Merge::Remove { path, .. } => assert!(forest.overlays(path).next().is_none()),
            }
        }
    }

    fn any_forest() -> impl Strategy<Value = (Forest, Data)> {
        // Of each layer: which of the earlier ones it stands on, whether it is needed, which blocks it holds.
        let one = (any::<prop::sample::Index>(), 0_u8..4, prop::collection::btree_set(0..SIZE as u8, 0..8));
        prop::collection::vec(one, 1..12).prop_map(|layers| {
            let (mut forest, mut data) = (Forest::default(), Data::new());
            for (number, (below, role, blocks)) in layers.into_iter().enumerate() {
                let name = |number: usize| PathBuf::from(format!("{number:02}"));
                let below = below.index(number + 1);
                let backing = (below < number).then(|| name(below));
                let role = if role == 0 { Role::Kept } else { Role::Released };
                let made = Layer { backing, ..layer(None, role, blocks.len() as u64) };
                forest.layers.insert(name(number), made);
                data.insert(name(number), blocks.into_iter().map(|block| (block, number)).collect());
            }
            // One leaf is a disk.
            if let Some(mut last) = forest.layers.last_entry() {
                last.get_mut().role = Role::Active;
            }
            (forest, data)
        })
    }

    proptest! {
        #[test]
        fn every_point_that_stays_reads_as_before((mut forest, mut data) in any_forest()) {
            let kept: Vec<PathBuf> = forest.layers.iter()
                .filter(|(_, layer)| layer.role != Role::Released).map(|(path, _)| path.clone()).collect();
            let image = |forest: &Forest, data: &Data, path: &Path| -> Vec<Option<usize>> {
                (0..SIZE as u8).map(|block| read(forest, data, path, block)).collect()
            };
            let before: Vec<_> = kept.iter().map(|path| image(&forest, &data, path)).collect();
            // Where each point is now.
            let mut at = kept.clone();
            while let Some(merge) = forest.next() {
                copy(&forest, &mut data, &merge);
                forest.apply(&merge);
                merge.removed().iter().for_each(|path| drop(data.remove(path)));
                if let Merge::Commit { top, base, .. } = &merge {
                    at.iter_mut().filter(|path| *path == top).for_each(|path| path.clone_from(base));
                }
                for (path, before) in at.iter().zip(&before) {
                    prop_assert!(forest.layers.contains_key(path));
                    prop_assert_eq!(&image(&forest, &data, path), before);
                }
            }
            // What is left of the released layers has several overlays, and every backing file is there.
            for (path, layer) in &forest.layers {
                prop_assert!(layer.role != Role::Released || forest.overlays(path).count() > 1);
                prop_assert!(layer.backing.as_ref().is_none_or(|below| forest.layers.contains_key(below)));
            }
            let distinct: BTreeSet<_> = at.iter().collect();
            prop_assert_eq!(distinct.len(), at.len());
        }
    }
}
