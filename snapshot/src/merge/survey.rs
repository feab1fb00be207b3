//! The forest as it is: what the files' headers say, what QEMU has open, and what snapshots need.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use model::{DiskName, History, ImageFormat, Name};
use storage::chain::{Chain, ChainError, ChainPolicy, Layer as ChainLayer, overlays_of};
use vm::Machine;
use vm::disks::{ActiveLayer, Disk};

use super::forest::{Forest, Layer, Role};
use crate::aside;
use crate::lineage::name_by_history;
use crate::plan::{Refusal, refuse_stale};
use crate::view::policy;

/// What was found.
#[derive(Debug)]
pub(crate) struct Survey {
    pub forest: Forest,
    /// Each disk's name with its active layer.
    pub heads: Vec<(DiskName, PathBuf)>,
}

/// Looks at every layer of `vm`. `known` is what is remembered of every VM.
///
/// # Errors
/// [`Refusal::Chain`] if a chain cannot be followed: then nobody knows what stands on what;
/// [`Refusal::ChainDiffers`] if QEMU has other layers open than the headers name; [`Refusal::StaleLayer`].
pub(crate) fn survey(vm: &Name, machine: Option<&Machine>, known: &History) -> Result<Survey, Refusal> {
    let policy = policy(known);
    let roles = Roles::of(vm, known);
    let mut heads = Vec::new();
    let mut forest = Forest::default();
    for disk in machine.map(|machine| named(&machine.disks, known)).unwrap_or_default() {
        let Some(layer) = disk.layer() else { continue };
        let chain = Chain::open(&layer.path, layer.format, &policy)?;
        refuse_other_chain(&disk, layer, &chain)?;
        refuse_stale(vm, &disk, &layer.path, known)?;
        add(&mut forest, &chain, &roles);
        set_role(&mut forest, &layer.path, Role::Running);
        heads.push((disk.name.clone(), layer.path.clone()));
    }
    for head in known.heads.iter().filter(|head| head.vm == *vm) {
        if !forest.layers.contains_key(&head.path)
            && let Some(chain) = open(&head.path, head.format, &policy)?
        {
            add(&mut forest, &chain, &roles);
            set_role(&mut forest, &head.path, Role::Active);
            heads.push((head.disk.clone(), head.path.clone()));
        }
    }
    for (_, layer) in known.layers().filter(|(snapshot, _)| snapshot.vm == *vm) {
        if !forest.layers.contains_key(&layer.path)
            && let Some(chain) = open(&layer.path, layer.format, &policy)?
        {
            add(&mut forest, &chain, &roles);
        }
    }
    find_others(&mut forest)?;
    pin_devices(&mut forest);
    Ok(Survey { forest, heads })
}

/// A device that overlays stand on is a disk's home: they go down into it, and it never goes away. One on which nothing
/// stands may go if it is a thin volume, which reverts leave behind.
fn pin_devices(forest: &mut Forest) {
    let below: BTreeSet<PathBuf> = forest.layers.values().filter_map(|layer| layer.backing.clone()).collect();
    let released = forest.layers.iter_mut().filter(|(_, layer)| layer.role == Role::Released);
    for (path, layer) in released.filter(|(path, _)| aside::is_device(path)) {
        layer.pinned |= below.contains(path) || !aside::is_thin(path);
    }
}

/// Whose layers are needed for what.
struct Roles<'a> {
    kept: BTreeSet<&'a Path>,
    released: BTreeSet<&'a Path>,
}

impl<'a> Roles<'a> {
    fn of(vm: &Name, known: &'a History) -> Self {
        let mut roles = Self { kept: BTreeSet::new(), released: BTreeSet::new() };
        for (snapshot, layer) in known.layers() {
            if snapshot.vm == *vm && snapshot.deleted.is_some() {
                roles.released.insert(&layer.path);
            } else {
                roles.kept.insert(&layer.path);
            }
            if snapshot.vm != *vm {
                roles.kept.insert(&layer.overlay);
            }
        }
        roles.kept.extend(known.heads.iter().map(|head| head.path.as_path()));
        roles
    }

    /// A layer that no record names may be anybody's: a template, for example.
    fn role(&self, path: &Path) -> Role {
        match self.released.contains(path) && !self.kept.contains(path) {
            true => Role::Released,
            false => Role::Kept,
        }
    }
}

fn named(disks: &[Disk], known: &History) -> Vec<Disk> {
    let mut disks = disks.to_vec();
    name_by_history(&mut disks, known);
    disks
}

/// The chain that ends in `path`; none if there is no such file, which `snapctl check` tells.
fn open(path: &Path, format: ImageFormat, policy: &ChainPolicy) -> Result<Option<Chain>, Refusal> {
    match Chain::open(path, format, policy) {
        Ok(chain) => Ok(Some(chain)),
        Err(ChainError::Missing { overlay: None, .. }) => Ok(None),
        Err(fault) => Err(fault.into()),
    }
}

fn add(forest: &mut Forest, chain: &Chain, roles: &Roles<'_>) {
    for layer in chain.layers() {
        forest.layers.entry(layer.path.clone()).or_insert_with(|| Layer {
            format: layer.format,
            virtual_size: layer.virtual_size.0,
            allocated: layer.allocated.0,
            backing: layer.backing.as_ref().map(|backing| backing.path.clone()),
            role: roles.role(&layer.path),
            pinned: holds_internal(layer),
            others: Vec::new(),
        });
    }
}

/// Whether the image holds snapshots inside, of snapctl or of anybody.
pub(crate) fn holds_internal(layer: &ChainLayer) -> bool {
    layer.header.as_ref().is_some_and(|header| header.internal_snapshots > 0)
}

fn set_role(forest: &mut Forest, path: &Path, role: Role) {
    if let Some(layer) = forest.layers.get_mut(path) {
        layer.role = role;
    }
}

/// Refuses where QEMU has other layers open than the headers name.
pub(crate) fn refuse_other_chain(disk: &Disk, layer: &ActiveLayer, chain: &Chain) -> Result<(), Refusal> {
    let open = layer.below.iter().map(|below| below.path.as_deref());
    let named = chain.layers().rev().skip(1).map(|layer| Some(layer.path.as_path()));
    match open.eq(named) {
        true => Ok(()),
        false => Err(Refusal::ChainDiffers {
            disk: disk.name.clone(),
            active: layer.path.clone(),
            open: layer.below.len(),
            named: chain.layers().count() - 1,
        }),
    }
}

/// Finds what stands on the released layers, and on those right above them, beside what is known: clones that
/// somebody made, and images of which it cannot be told.
///
/// Source: QEMU's image locks protect only what is open; a commit into a base that another image stands on
/// changes what that one reads, and no check finds it.
fn find_others(forest: &mut Forest) -> Result<(), Refusal> {
    let released: BTreeSet<PathBuf> = forest
        .layers
        .iter()
        .filter(|(_, layer)| layer.role == Role::Released)
        .map(|(path, _)| path.clone())
        .collect();
    let on_released = forest
        .layers
        .iter()
        .filter(|(_, layer)| layer.backing.as_ref().is_some_and(|backing| released.contains(backing)));
    let watched: BTreeSet<PathBuf> =
        on_released.map(|(path, _)| path.clone()).chain(released.iter().cloned()).collect();
    let dirs: BTreeSet<PathBuf> =
        forest.layers.keys().map(|path| host::files::parent(path).to_owned()).collect();
    for path in &watched {
        for dir in &dirs {
            let found = overlays_of(dir, path)?;
            let images = found.found.into_iter().chain(found.doubtful.into_iter().map(|(image, _)| image));
            let others: Vec<PathBuf> =
                images.filter(|image| image != path && !forest.layers.contains_key(image)).collect();
            if let Some(layer) = forest.layers.get_mut(path) {
                layer.others.extend(others);
            }
        }
    }
    Ok(())
}
