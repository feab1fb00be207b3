//! Starting and stopping networks, and plugging ports into them: the same for every kind.
//!
//! What a started network consists of is written down ([`Record`]) before the first part is made, and forgotten after
//! the last one is gone. A record that says *starting*, *stopping* or *plugging* is what a killed command left; its
//! parts are looked at and taken away by the next one.
//!
//! The caller holds the lock of all networks: subnets, names and forwarding are the host's.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;

use host::fault;
use host::files;
use model::Name;
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

use crate::filter;
use crate::network::{Claim, NetworkDefinition, refuse_collisions};
use crate::part::{Host, Made, Part, Places, Seen};
use crate::port::PortRequest;
use crate::{HostView, IfName, NetError};

/// Most that a record can be long.
const RECORD_MAX: u64 = 16 << 20;

/// How far a network has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Its parts are being made.
    Starting,
    /// They are all there.
    Started,
    /// They are being taken away.
    Stopping,
}

/// A port that is plugged in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Port {
    /// What was asked for.
    pub request: PortRequest,
    /// The guest's addresses that are known: those that were asked for, and those that the network has fixed.
    pub addresses: Vec<IpAddr>,
    /// Its parts.
    pub parts: Vec<Made>,
    /// Whether they are all there.
    pub plugged: bool,
}

/// What a started network consists of: `NAME.json` in the directory of what a reboot takes away.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// How far it is.
    pub phase: Phase,
    /// Whether its definition goes when it is stopped.
    #[serde(default)]
    pub transient: bool,
    /// As it was defined when it was started.
    pub definition: NetworkDefinition,
    /// Its parts, in the order in which they were made.
    pub parts: Vec<Made>,
    /// Its ports.
    pub ports: BTreeMap<IfName, Port>,
    /// The rules of its ports, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<Made>,
}

impl Port {
    /// Whether rules hold it to its addresses: they are a bridge's, so that a macvtap has none.
    pub(crate) fn is_held(&self) -> bool {
        let in_bridge = self.parts.iter().any(|made| matches!(made.part, Part::BridgePort(_)));
        // A test's port has no parts.
        self.request.mac.is_some() && !self.request.trust && (in_bridge || self.parts.is_empty())
    }
}

/// What starting did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Started {
    /// It was not started before.
    New,
    /// It was, and everything is as it should be.
    AlreadySo,
    /// It was, and these parts were not as they should be.
    Mended(Vec<String>),
}

impl Record {
    /// The record of a network; none if it is not started.
    ///
    /// # Errors
    /// [`NetError::BadRecord`]; [`NetError::Host`].
    pub fn load(places: &Places, network: &Name) -> Result<Option<Self>, NetError> {
        let file = places.record(network);
        match files::read_bounded(&file, RECORD_MAX) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|fault| NetError::BadRecord { file, fault: fault.to_string() }),
            Err(fault) if fault.kind() == Some(ErrorKind::NotFound) => Ok(None),
            Err(fault) => Err(fault.into()),
        }
    }

    /// The networks of which there are records.
    ///
    /// # Errors
    /// [`NetError::Host`].
    pub fn names(places: &Places) -> Result<Vec<Name>, NetError> {
        let entries = match fs::read_dir(&places.run) {
            Ok(entries) => entries,
            Err(fault) if fault.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(fault) => return Err(host::Error::io("read", &places.run)(fault).into()),
        };
        let files = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<Name> =
            files.filter_map(|file| file.strip_suffix(".json")?.parse().ok()).collect();
        names.sort();
        Ok(names)
    }

    fn save(&self, places: &Places, network: &Name) -> Result<(), NetError> {
        let file = places.record(network);
        let text = serde_json::to_vec_pretty(self)
            .map_err(|fault| NetError::BadRecord { file: file.clone(), fault: fault.to_string() })?;
        files::make_private_dir(&places.run)?;
        Ok(files::write_durably(&file, &text, 0o600)?)
    }

    fn forget(places: &Places, network: &Name) -> Result<(), NetError> {
        files::remove_durably(&places.record(network))?;
        Ok(())
    }

    /// Whether a command was killed over it.
    pub fn is_interrupted(&self) -> bool {
        self.phase != Phase::Started || self.ports.values().any(|port| !port.plugged)
    }

    /// What is not as it was made, in words.
    ///
    /// # Errors
    /// [`NetError`] if it cannot be seen.
    pub async fn drift(&self, host: &Host) -> Result<Vec<String>, NetError> {
        let mut found = Vec::new();
        for made in self.all_parts() {
            match made.part.observe(host, made.print.as_deref()).await? {
                Seen::There => {}
                Seen::Missing => found.push(format!("{} is missing", made.part)),
                Seen::Differs(how) => found.push(format!("{}: {how}", made.part)),
            }
        }
        Ok(found)
    }

    fn all_parts(&self) -> impl Iterator<Item = &Made> {
        self.parts.iter().chain(self.ports.values().flat_map(|port| &port.parts)).chain(&self.filter)
    }
}

/// Decides which parts a start would make.
///
/// # Errors
/// [`NetError::SubnetTaken`], [`NetError::InterfaceTaken`], and what the kind says.
pub fn plan(
    network: &Name,
    definition: &NetworkDefinition,
    view: &HostView,
    others: &[Claim],
) -> Result<Vec<Part>, NetError> {
    let opened = definition.open(network)?;
    refuse_collisions(&opened.claim(), view, others)?;
    let parts = opened.parts(view)?;
    for part in &parts {
        if let Part::Link(link) = part
            && let Some(there) = view.link(&link.name)
        {
            crate::link::refuse_foreign(there, network, false)?;
        }
    }
    Ok(parts)
}

/// Starts a network, or mends one that is started.
///
/// # Errors
/// [`NetError`]; then everything that was made is taken away again, or [`NetError::PartlyUndone`] says what is not.
pub async fn start(
    host: &Host,
    network: &Name,
    definition: &NetworkDefinition,
    others: &[Claim],
    transient: bool,
) -> Result<Started, NetError> {
    require_privilege("change networks")?;
    settle(host, network).await?;
    if let Some(record) = Record::load(&host.places, network)? {
        return mend(host, network, record).await;
    }
    let view = host.netlink.view().await?;
    let parts = plan(network, definition, &view, others)?;
    let parts = parts.into_iter().map(|part| Made { part, print: None }).collect();
    let definition = definition.clone();
    let mut record =
        Record { phase: Phase::Starting, transient, definition, parts, ports: BTreeMap::new(), filter: None };
    record.save(&host.places, network)?;
    fault::point("net.begun")?;
    let mut made = 0;
    let result = make_all(host, network, &mut record.parts, &mut made).await;
    if let Err(fault) = result {
        let undone = unmake_all(host, &record.parts[..made], true).await;
        return Err(undo(fault, undone, || Record::forget(&host.places, network)));
    }
    record.phase = Phase::Started;
    record.save(&host.places, network)?;
    fault::point("net.started")?;
    Ok(Started::New)
}

/// Refuses before anything is begun that would fail half-way.
fn require_privilege(what: &str) -> Result<(), NetError> {
    let held =
        rustix::thread::capabilities(None).map(|sets| sets.effective).unwrap_or(CapabilitySet::empty());
    match held.contains(CapabilitySet::NET_ADMIN) {
        true => Ok(()),
        false => Err(NetError::NoPrivilege { what: what.to_owned() }),
    }
}

/// Makes parts in order and looks at each; `made` tells how many may be there.
async fn make_all(host: &Host, network: &Name, parts: &mut [Made], made: &mut usize) -> Result<(), NetError> {
    for Made { part, print } in parts {
        host.watch.check()?;
        *made += 1;
        *print = match part.make(host).await {
            // Somebody else has the name: nothing was made, and what is there is theirs.
            Err(taken @ NetError::InterfaceTaken { .. }) => {
                *made -= 1;
                return Err(taken);
            }
            done => done?,
        };
        fault::point(&format!("net.made.{made}"))?;
        let seen = match part.observe(host, print.as_deref()).await? {
            Seen::There => continue,
            Seen::Missing => "it is not there".to_owned(),
            Seen::Differs(how) => how,
        };
        return Err(NetError::NotAsMade { network: network.clone(), what: part.to_string(), seen });
    }
    Ok(())
}

/// Takes parts away, the last one first. One that stays keeps no other from going.
async fn unmake_all(host: &Host, parts: &[Made], begun: bool) -> Vec<String> {
    let mut left = Vec::new();
    for (number, made) in parts.iter().enumerate().rev() {
        if let Err(fault) = made.part.unmake(host, begun).await {
            left.push(format!("{}: {fault}", made.part));
        }
        if let Err(fault) = fault::point(&format!("net.unmade.{}", number + 1)) {
            left.push(fault.to_string());
        }
    }
    left
}

/// The error to tell when something failed and was undone.
fn undo(fault: NetError, left: Vec<String>, forget: impl FnOnce() -> Result<(), NetError>) -> NetError {
    let mut left = left;
    if left.is_empty()
        && let Err(fault) = forget()
    {
        left.push(fault.to_string());
    }
    match left.as_slice() {
        [] => fault,
        left => NetError::PartlyUndone { fault: Box::new(fault), left: left.join("; ") },
    }
}

async fn mend(host: &Host, network: &Name, mut record: Record) -> Result<Started, NetError> {
    let drift = record.drift(host).await?;
    if drift.is_empty() {
        return Ok(Started::AlreadySo);
    }
    let mut made = 0;
    make_all(host, network, &mut record.parts, &mut made).await?;
    for port in record.ports.values_mut() {
        make_all(host, network, &mut port.parts, &mut made).await?;
    }
    if record.filter.is_some() {
        filter_anew(network, &mut record)?;
    }
    record.save(&host.places, network)?;
    Ok(Started::Mended(drift))
}

/// Puts the rules that hold the ports of the record in place of those that there are, at once, whatever is there.
fn filter_anew(network: &Name, record: &mut Record) -> Result<(), NetError> {
    record.filter = match filter::table(network, &record.ports) {
        Some(table) => {
            let print = Some(table.make()?);
            Some(Made { part: Part::Table(table), print })
        }
        None => {
            filter::empty(network).unmake()?;
            None
        }
    };
    Ok(())
}

/// Finishes or undoes what a killed command left of a network. Tells whether there was anything.
///
/// # Errors
/// [`NetError::PartlyStopped`] with what stays.
pub async fn settle(host: &Host, network: &Name) -> Result<bool, NetError> {
    let Some(mut record) = Record::load(&host.places, network)? else { return Ok(false) };
    if !record.is_interrupted() {
        return Ok(false);
    }
    if record.phase == Phase::Started {
        let begun: Vec<IfName> =
            record.ports.iter().filter(|(_, port)| !port.plugged).map(|(name, _)| name.clone()).collect();
        let held = record.filter.is_some() || begun.iter().any(|name| record.ports[name].is_held());
        for name in begun {
            keep_on(network, &unmake_all(host, &record.ports[&name].parts, true).await)?;
            record.ports.remove(&name);
        }
        // Not every kind needs nft: who has no rules is not asked for them.
        if held {
            filter_anew(network, &mut record)?;
        }
        record.save(&host.places, network)?;
        return Ok(true);
    }
    take_away(host, network, &record, true).await?;
    Ok(true)
}

/// Stops a network. Tells whether it was started; one that is not is no error.
///
/// `with_ports` takes its ports away too; without it they forbid the stop.
///
/// # Errors
/// [`NetError::Refused`] if somebody uses it; [`NetError::PartlyStopped`].
pub async fn stop(host: &Host, network: &Name, with_ports: bool) -> Result<bool, NetError> {
    require_privilege("change networks")?;
    let settled = settle(host, network).await?;
    let Some(mut record) = Record::load(&host.places, network)? else { return Ok(settled) };
    if !record.ports.is_empty() && !with_ports {
        let ports: Vec<&str> = record.ports.keys().map(IfName::as_str).collect();
        let why = format!("guests are plugged into it ({}); unplug them, or add --force", ports.join(", "));
        return Err(NetError::Refused { network: network.clone(), why });
    }
    refuse_guests(host, network, &record).await?;
    record.phase = Phase::Stopping;
    record.save(&host.places, network)?;
    fault::point("net.stopping")?;
    take_away(host, network, &record, false).await?;
    Ok(true)
}

/// Refuses before anything is taken away, if the bridge cannot go.
async fn refuse_guests(host: &Host, network: &Name, record: &Record) -> Result<(), NetError> {
    let view = host.netlink.view().await?;
    let enslaved = |name: &str| {
        record
            .parts
            .iter()
            .any(|made| matches!(&made.part, Part::Enslaved(part) if part.name.as_str() == name))
    };
    for made in &record.parts {
        if let Part::Link(link) = &made.part
            && let Some(seen) = view.link(&link.name)
        {
            crate::link::refuse_guests(&view, seen, network, enslaved)?;
        }
    }
    Ok(())
}

async fn take_away(host: &Host, network: &Name, record: &Record, begun: bool) -> Result<(), NetError> {
    let mut left = Vec::new();
    for port in record.ports.values() {
        left.extend(unmake_all(host, &port.parts, begun).await);
    }
    let filtered = record.filter.is_some() || record.ports.values().any(Port::is_held);
    if filtered && let Err(fault) = filter::empty(network).unmake() {
        left.push(fault.to_string());
    }
    left.extend(unmake_all(host, &record.parts, begun).await);
    keep_on(network, &left)?;
    Record::forget(&host.places, network)
}

fn keep_on(network: &Name, left: &[String]) -> Result<(), NetError> {
    match left {
        [] => Ok(()),
        left => Err(NetError::PartlyStopped { network: network.clone(), left: left.join("; ") }),
    }
}

/// Plugs a port into a started network. The same once more is a success; returns whether it is new.
///
/// # Errors
/// [`NetError::NotStarted`], [`NetError::InterfaceTaken`], [`NetError::MacTaken`], [`NetError::Refused`]; nothing is
/// left behind.
pub async fn plug(
    host: &Host,
    network: &Name,
    name: &IfName,
    request: &PortRequest,
) -> Result<bool, NetError> {
    require_privilege("change ports")?;
    settle(host, network).await?;
    let not_started = || NetError::NotStarted { network: network.clone() };
    let mut record = Record::load(&host.places, network)?.ok_or_else(not_started)?;
    if let Some(port) = record.ports.get(name) {
        if port.request == *request {
            return Ok(false);
        }
        let why = format!("is a port of network {network} already, of another make");
        return Err(NetError::InterfaceTaken { name: name.clone(), why });
    }
    if host.netlink.link(name).await?.is_some() {
        return Err(NetError::InterfaceTaken { name: name.clone(), why: "is in use".into() });
    }
    refuse_mac(&host.places, request)?;
    let kind = record.definition.open(network)?;
    let parts = kind.port(name, request)?.into_iter().map(|part| Made { part, print: None }).collect();
    let mut addresses = request.address.clone();
    addresses.extend(request.mac.map(|mac| kind.fixed(mac)).unwrap_or_default());
    let mut port = Port { request: request.clone(), addresses, parts, plugged: false };
    record.ports.insert(name.clone(), port.clone());
    record.save(&host.places, network)?;
    fault::point("net.plugging")?;
    let mut made = 0;
    let result = make_port(host, network, &mut record, &mut port, &mut made).await;
    if let Err(fault) = result {
        let mut undone = unmake_all(host, &port.parts[..made], true).await;
        record.ports.remove(name);
        if port.is_held() {
            undone.extend(filter_anew(network, &mut record).err().map(|fault| fault.to_string()));
        }
        return Err(undo(fault, undone, || record.save(&host.places, network)));
    }
    port.plugged = true;
    record.ports.insert(name.clone(), port);
    record.save(&host.places, network)?;
    Ok(true)
}

/// Makes the rules of a port, and then the port, so that no frame of it passes before.
async fn make_port(
    host: &Host,
    network: &Name,
    record: &mut Record,
    port: &mut Port,
    made: &mut usize,
) -> Result<(), NetError> {
    if port.is_held() {
        filter_anew(network, record)?;
        fault::point("net.filtered")?;
    }
    make_all(host, network, &mut port.parts, made).await
}

/// Refuses an address that a port of any network has.
fn refuse_mac(places: &Places, request: &PortRequest) -> Result<(), NetError> {
    let Some(mac) = request.mac else { return Ok(()) };
    for network in Record::names(places)? {
        let Some(record) = Record::load(places, &network)? else { continue };
        let holder = record.ports.iter().find(|(_, port)| port.request.mac == Some(mac));
        if let Some((port, _)) = holder {
            return Err(NetError::MacTaken { mac, holder: format!("port {port} of network {network}") });
        }
    }
    Ok(())
}

/// The undo of [`plug`].
///
/// # Errors
/// [`NetError::NotStarted`], [`NetError::NoSuchPort`], [`NetError::PartlyStopped`].
pub async fn unplug(host: &Host, network: &Name, name: &IfName) -> Result<(), NetError> {
    require_privilege("change ports")?;
    settle(host, network).await?;
    let not_started = || NetError::NotStarted { network: network.clone() };
    let mut record = Record::load(&host.places, network)?.ok_or_else(not_started)?;
    let unknown = || NetError::NoSuchPort { network: network.clone(), port: name.clone() };
    let port = record.ports.get_mut(name).ok_or_else(unknown)?;
    port.plugged = false;
    let parts = port.parts.clone();
    record.save(&host.places, network)?;
    fault::point("net.unplugging")?;
    keep_on(network, &unmake_all(host, &parts, false).await)?;
    if record.ports.remove(name).is_some_and(|port| port.is_held()) {
        filter_anew(network, &mut record)?;
        fault::point("net.filtered")?;
    }
    record.save(&host.places, network)
}
