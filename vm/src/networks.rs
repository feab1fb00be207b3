//! Defined networks, under the one lock that they share: names, subnets and forwarding are the host's.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use host::lock::{FileLock, LockError};
use host::watch::Watch;
use model::Name;
use net::lifecycle::Record;
use net::network::{Claim, Kind, NetworkDefinition, Request};
use net::part::{Host, Places};
use net::{NetError, netlink::Netlink};
use toml::Table;

use crate::{Added, Error, Paths, Registry};

/// A network that is defined, or that was and is still started.
#[derive(Debug)]
pub struct KnownNetwork {
    /// As it is defined; as it was started where it is transient or its definition is gone.
    pub definition: NetworkDefinition,
    /// What it consists of, if it is started.
    pub record: Option<Record>,
    /// Whether there is a definition in a file.
    pub persistent: bool,
}

/// The host, for whoever looks.
///
/// # Errors
/// [`Error::Net`] if the kernel cannot be asked.
pub fn host(paths: &Paths) -> Result<Host, Error> {
    Ok(Host { netlink: Netlink::open()?, places: places(paths), watch: Watch::default() })
}

/// Where networks keep things.
pub fn places(paths: &Paths) -> Places {
    Places { run: paths.run.join("networks"), state: paths.state.join("networks") }
}

/// Takes the lock of all networks.
///
/// # Errors
/// [`Error::NetworksBusy`]; [`Error::Host`].
pub async fn lock(paths: &Paths, wait: Option<Duration>) -> Result<FileLock, Error> {
    FileLock::acquire(&paths.networks_lock(), wait).await.map_err(|source| match source {
        LockError::Host(fault) => Error::Host(fault),
        source => Error::NetworksBusy { source },
    })
}

/// The names of all networks, defined or started, in order.
///
/// # Errors
/// [`Error::Host`].
pub fn names(paths: &Paths) -> Result<Vec<Name>, Error> {
    let mut names: BTreeSet<Name> = Registry::<NetworkDefinition>::new(paths).names()?.into_iter().collect();
    names.extend(Record::names(&places(paths))?);
    Ok(names.into_iter().collect())
}

/// One network.
///
/// # Errors
/// [`Error::NoSuchNetwork`], [`Error::BadDefinition`], [`Error::Net`].
pub fn known(paths: &Paths, name: &Name) -> Result<KnownNetwork, Error> {
    let record = Record::load(&places(paths), name)?;
    match (Registry::new(paths).load(name), record) {
        (Ok(definition), record) => Ok(KnownNetwork { definition, record, persistent: true }),
        (Err(Error::NoSuchNetwork { .. }), Some(record)) => Ok(KnownNetwork {
            definition: record.definition.clone(),
            record: Some(record),
            persistent: false,
        }),
        (Err(Error::NoSuchNetwork { .. }), None) => {
            Err(Error::NoSuchNetwork { name: name.clone(), known: names(paths)? })
        }
        (Err(fault), _) => Err(fault),
    }
}

/// What all networks but `except` claim. One that cannot be read is in nobody's way.
///
/// # Errors
/// [`Error::Host`].
pub fn claims(paths: &Paths, except: &Name) -> Result<Vec<Claim>, Error> {
    let others = names(paths)?.into_iter().filter(|name| name != except);
    Ok(others
        .filter_map(|name| Some(known(paths, &name).ok()?.definition.open(&name).ok()?.claim()))
        .collect())
}

/// Completes a definition of what the user asks for. The caller holds the lock.
///
/// # Errors
/// [`Error::Net`] with what does not fit.
pub async fn complete(
    paths: &Paths,
    host: &Host,
    name: &Name,
    kind: &str,
    options: Table,
    autostart: bool,
) -> Result<NetworkDefinition, Error> {
    let kind = Kind::named(kind)?;
    let registry: Registry<NetworkDefinition> = Registry::new(paths);
    // What was chosen the first time is chosen again.
    if let Ok(known) = registry.load(name)
        && known.kind == kind.name
        && options.iter().all(|(key, value)| known.options.get(key) == Some(value))
    {
        return Ok(NetworkDefinition { autostart: known.autostart || autostart, ..known });
    }
    if registry.names()?.contains(name) {
        return Err(Error::NetworkNameTaken { name: name.clone(), file: registry.file(name) });
    }
    let view = host.netlink.view().await?;
    let others = claims(paths, name)?;
    let dice = RandomState::new().build_hasher().finish();
    let request = Request { network: name, options, view: &view, others: &others, dice };
    Ok(NetworkDefinition::new(kind, &request, autostart)?)
}

/// Enters a definition. The same once more is a success that says so. The caller holds the lock.
///
/// # Errors
/// [`Error::NetworkNameTaken`]; [`Error::Host`].
pub fn define(paths: &Paths, name: &Name, definition: &NetworkDefinition) -> Result<Added, Error> {
    Registry::new(paths).add(name, definition)
}

/// Forgets a network that is not started, with its leases. The caller holds the lock.
///
/// # Errors
/// [`Error::NetworkStarted`]; [`Error::NoSuchNetwork`]; [`Error::Host`].
pub fn remove(paths: &Paths, name: &Name) -> Result<(), Error> {
    let places = places(paths);
    if Record::load(&places, name)?.is_some() {
        return Err(Error::NetworkStarted { name: name.clone() });
    }
    Registry::<NetworkDefinition>::new(paths).remove(name)?;
    host::files::remove_durably(&places.leases(name))?;
    Ok(())
}

impl From<NetError> for Error {
    fn from(fault: NetError) -> Self {
        Self::Net(fault)
    }
}
