//! Defined pools under their locks, and what VMs have to do with their volumes.

use std::path::Path;
use std::time::Duration;

use host::lock::{FileLock, LockError};
use model::Name;
use storage::pool::{Kind, Pool, PoolDefinition, Request, sweep};
use storage::volume::Here;

use crate::{Error, Paths, Registry, State, VmDefinition};

/// One pool under its lock.
#[derive(Debug)]
pub struct OpenPool {
    /// Its name.
    pub name: Name,
    /// As it is defined.
    pub definition: PoolDefinition,
    /// The pool.
    pub pool: Box<dyn Pool>,
    _lock: Option<FileLock>,
}

impl OpenPool {
    /// The pool for those who only look: without its lock.
    ///
    /// # Errors
    /// [`Error::NoSuchPool`], [`Error::BadDefinition`], [`Error::Pool`].
    pub fn look(paths: &Paths, name: &Name) -> Result<Self, Error> {
        let definition: PoolDefinition = Registry::new(paths).load(name)?;
        let pool = definition.open(name)?;
        Ok(Self { name: name.clone(), definition, pool, _lock: None })
    }

    /// The pool for whoever changes something in it. What killed commands left in it is removed; tells of which
    /// volumes that was.
    ///
    /// # Errors
    /// As [`OpenPool::look`]; [`Error::PoolBusy`]; [`Error::Pool`] if it is not ready.
    pub async fn change(
        paths: &Paths,
        name: &Name,
        wait: Option<Duration>,
    ) -> Result<(Self, Vec<Name>), Error> {
        let opened = Self::locked(paths, name, wait).await?;
        opened.pool.ready()?;
        let swept = sweep(opened.pool.as_ref())?;
        Ok((opened, swept))
    }

    /// The pool under its lock, ready or not.
    ///
    /// # Errors
    /// As [`OpenPool::look`]; [`Error::PoolBusy`].
    pub async fn locked(paths: &Paths, name: &Name, wait: Option<Duration>) -> Result<Self, Error> {
        let opened = Self::look(paths, name)?;
        let lock = lock(paths, name, wait).await?;
        Ok(Self { _lock: Some(lock), ..opened })
    }

    /// The same, for the room that works on volumes.
    pub fn here(&self) -> Here<'_> {
        Here { name: &self.name, pool: self.pool.as_ref() }
    }
}

/// Refuses a snapshot in a thin pool that is near its end, by the thresholds of the pool that is defined on it, or by
/// those that count where none is.
///
/// # Errors
/// [`Error::Pool`] with [`storage::PoolError::OverThreshold`].
pub fn require_thin_room(paths: &Paths, vg: &str, thin_pool: &str) -> Result<(), Error> {
    let registry: Registry<PoolDefinition> = Registry::new(paths);
    let is_it = |definition: &PoolDefinition| {
        let option = |key: &str| definition.options.get(key).and_then(toml::Value::as_str);
        option("vg") == Some(vg) && option("thin-pool") == Some(thin_pool)
    };
    let defined = registry.names()?.into_iter().find_map(|name| {
        let definition = registry.load(&name).ok().filter(is_it)?;
        definition.open(&name).ok()
    });
    match defined {
        Some(pool) => Ok(pool.require_room()?),
        None => Ok(storage::pool::thin(vg, thin_pool)?.require_room()?),
    }
}

/// Takes the lock of a pool.
///
/// # Errors
/// [`Error::PoolBusy`]; [`Error::Host`].
pub async fn lock(paths: &Paths, pool: &Name, wait: Option<Duration>) -> Result<FileLock, Error> {
    FileLock::acquire(&paths.pool_lock(pool), wait).await.map_err(|source| match source {
        LockError::Host(fault) => Error::Host(fault),
        source => Error::PoolBusy { pool: pool.clone(), source },
    })
}

/// Makes the definition of a pool and enters it, under the pool's lock. The same once more is a success that says so.
///
/// # Errors
/// [`Error::PoolNameTaken`], [`Error::SamePlace`], [`Error::Pool`].
pub fn define(
    paths: &Paths,
    kind: &Kind,
    request: &Request<'_>,
    autostart: bool,
) -> Result<(PoolDefinition, crate::Added), Error> {
    let registry: Registry<PoolDefinition> = Registry::new(paths);
    refuse_taken(&registry, kind, request)?;
    let definition = PoolDefinition::new(kind, request, autostart)?;
    let place = definition.open(request.pool)?.location();
    for other in registry.names()?.into_iter().filter(|name| name != request.pool) {
        // One that cannot be read is in nobody's way.
        let Ok(there) = OpenPool::look(paths, &other) else { continue };
        if there.pool.location() == place || there.definition.options == definition.options {
            return Err(Error::SamePlace { other, place });
        }
    }
    let added = registry.add(request.pool, &definition)?;
    Ok((definition, added))
}

/// Refuses a name that another definition has, before a place is touched.
fn refuse_taken(
    registry: &Registry<PoolDefinition>,
    kind: &Kind,
    request: &Request<'_>,
) -> Result<(), Error> {
    let known = match registry.load(request.pool) {
        Ok(known) => known,
        Err(Error::NoSuchPool { .. }) => return Ok(()),
        Err(fault) => return Err(fault),
    };
    let same = |(key, value): (&String, &toml::Value)| known.options.get(key) == Some(value);
    if known.kind == kind.name && request.options.iter().all(same) {
        return Ok(());
    }
    Err(Error::PoolNameTaken { name: request.pool.clone(), file: registry.file(request.pool) })
}

/// Refuses to change a file or device that is a disk of a VM, or holds a snapshot, as the catalogue knows.
///
/// # Errors
/// [`Error::Claimed`]; [`Error::State`], [`Error::BadRecord`] if it cannot be told.
pub fn refuse_claimed(paths: &Paths, path: &Path) -> Result<(), Error> {
    let known = State::open_existing(paths)?.history(None)?;
    let real = storage::real_path(path).unwrap_or_else(|_| path.to_owned());
    let is_it = |other: &Path| other == path || other == real;
    let holder = known.layers().rev().find(|(_, layer)| is_it(&layer.path));
    // What is left of a VM that is forgotten claims nothing.
    let vms = Registry::<VmDefinition>::new(paths).names()?;
    let matters =
        |head: &&model::Head| vms.contains(&head.vm) || known.visible().any(|known| known.vm == head.vm);
    let head = known.heads.iter().filter(matters).find(|head| is_it(&head.path));
    let inside = known.snapshots.iter().find(|snapshot| {
        snapshot.internal.iter().flat_map(|internal| &internal.disks).any(|disk| is_it(&disk.path))
    });
    let claim = match (holder, inside, head) {
        (Some((snapshot, layer)), ..) => {
            format!("holds snapshot {} of disk {} of {}", snapshot.name, layer.disk, snapshot.vm)
        }
        (None, Some(snapshot), _) => format!("holds snapshot {} of {} inside", snapshot.name, snapshot.vm),
        (None, None, Some(head)) => format!("is the active layer of disk {} of {}", head.disk, head.vm),
        (None, None, None) => return Ok(()),
    };
    Err(Error::Claimed { path: path.to_owned(), claim })
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use model::{ByteSize, DiskName, ImageFormat, LayerRecord, OperationId, SnapshotId, SnapshotRecord};

    use super::*;

    #[test]
    fn what_a_vm_runs_on_is_claimed_as_long_as_the_vm_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::under(dir.path());
        let (base, active) = (dir.path().join("v1.qcow2"), dir.path().join("v1.1a2b3c4d.qcow2"));
        for path in [&base, &active] {
            std::fs::write(path, "").unwrap();
        }
        let vm: Name = "vm1".parse().unwrap();
        let state = State::open(&paths).unwrap();
        let id = SnapshotId::from_bits(1);
        let mut record = SnapshotRecord::new(id, vm.clone(), "a".parse().unwrap(), Timestamp::UNIX_EPOCH);
        let (disk, format) = (DiskName::new("d"), ImageFormat::Qcow2);
        record.disks.push(LayerRecord::new(disk, base.clone(), format, active.clone(), ByteSize(1)));
        state.begin(OperationId::from_bits(1), &vm, "create", &()).unwrap().done(&record).unwrap();
        assert!(
            refuse_claimed(&paths, &base).unwrap_err().to_string().contains("holds snapshot a of disk d")
        );
        assert!(refuse_claimed(&paths, &active).unwrap_err().to_string().contains("active layer"));
        assert!(refuse_claimed(&paths, &dir.path().join("other")).is_ok());
        // Its snapshot is gone, and nobody knows the VM any more.
        let mut history = state.history(Some(&vm)).unwrap();
        history.snapshots.clear();
        state.begin(OperationId::from_bits(2), &vm, "delete", &()).unwrap().finish(&vm, &history).unwrap();
        assert!(refuse_claimed(&paths, &active).is_ok());
        let definition = VmDefinition { qmp: "/q".into(), agent: None, disks: Default::default() };
        Registry::new(&paths).add(&vm, &definition).unwrap();
        assert!(refuse_claimed(&paths, &active).is_err());
    }
}
