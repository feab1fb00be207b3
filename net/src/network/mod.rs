//! Networks: what the NICs of guests plug into, each kind in a file of its own.
//!
//! A kind is one file here and one line in [`KINDS`]. It decides, without touching anything, which [`Part`]s a started
//! network and its ports consist of; who makes and removes them does so for every kind alike ([`crate::lifecycle`]).

mod bridge;
mod isolated;
mod macvtap;
mod modules;
mod nat;
mod routed;
mod segment;
mod vlan;
mod vxlan;

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use model::Name;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::Table;

use crate::netlink::overlap;
use crate::part::Part;
use crate::port::PortRequest;
use crate::{HostView, IfName, MacAddress, NetError};

/// Every kind of network.
pub const KINDS: &[Kind] =
    &[isolated::KIND, nat::KIND, routed::KIND, bridge::KIND, macvtap::KIND, vlan::KIND, vxlan::KIND];

/// A network, or why there is none.
pub type Opened = Result<Box<dyn Network>, NetError>;

/// One kind of network.
#[derive(Clone, Copy)]
pub struct Kind {
    /// Its name.
    pub name: &'static str,
    /// What it is, for `--help` and for people.
    pub about: &'static str,
    /// The options of its own, as they are called in definitions and on the command line.
    pub options: &'static [&'static str],
    /// Whether it has a bridge of its own with addresses, DHCP and DNS: [`SEGMENT_OPTIONS`] too.
    pub segment: bool,
    /// Programs of the host that it calls.
    pub programs: &'static [&'static str],
    /// Modules of the kernel that it needs, unless they are built in.
    pub modules: &'static [&'static str],
    /// Completes what the user says: chooses what was left open, so that it collides with nothing.
    pub define: fn(&Request<'_>) -> Result<Table, NetError>,
    /// The network of a definition. Touches nothing.
    pub open: fn(&Name, Table) -> Opened,
}

/// The options that every kind with a bridge of its own takes.
pub const SEGMENT_OPTIONS: &[&str] = segment::OPTIONS;

/// What a user asks for when a network is defined.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The network's name.
    pub network: &'a Name,
    /// The options as given.
    pub options: Table,
    /// The host as it is.
    pub view: &'a HostView,
    /// What other networks claim.
    pub others: &'a [Claim],
    /// For what is chosen at random: a segment can span hosts, and no two may choose the same address.
    pub dice: u64,
}

/// What a network takes for itself, started or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The network.
    pub network: Name,
    /// Subnets.
    pub subnets: Vec<IpNet>,
    /// Interfaces that it makes, and those that are in its bridge.
    pub interfaces: Vec<IfName>,
    /// Addresses of its interfaces and of guests that are known.
    pub macs: Vec<MacAddress>,
}

/// A network's definition: `networks/NAME.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetworkDefinition {
    /// The name of its [`Kind`].
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether it is started with the host.
    #[serde(default)]
    pub autostart: bool,
    /// What the kind needs.
    #[serde(flatten)]
    pub options: Table,
}

/// A segment that NICs plug into. Every call decides only, and touches nothing.
pub trait Network: fmt::Debug + Send + Sync {
    /// The name of its kind.
    fn kind(&self) -> &'static str;

    /// What it is and where, for people, in a few words.
    fn summary(&self) -> String;

    /// What it takes for itself.
    fn claim(&self) -> Claim;

    /// The parts that it consists of when it is started, in the order in which they are made.
    ///
    /// # Errors
    /// [`NetError::NoInterface`], [`NetError::InterfaceTaken`], [`NetError::Refused`] if the host is not as it has to
    /// be.
    fn parts(&self, view: &HostView) -> Result<Vec<Part>, NetError>;

    /// The addresses that the guest with this NIC always has, as far as the network gives them out.
    fn fixed(&self, mac: MacAddress) -> Vec<IpAddr> {
        let _ = mac;
        Vec::new()
    }

    /// The parts of one port of the name `port`.
    ///
    /// # Errors
    /// [`NetError::Refused`] for a wish that this kind cannot fulfil.
    fn port(&self, port: &IfName, request: &PortRequest) -> Result<Vec<Part>, NetError>;
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kind({})", self.name)
    }
}

impl Kind {
    /// The kind of this name.
    ///
    /// # Errors
    /// [`NetError::NoSuchKind`].
    pub fn named(text: &str) -> Result<&'static Self, NetError> {
        let found = KINDS.iter().find(|kind| kind.name == text);
        found.ok_or_else(|| NetError::NoSuchKind { text: text.to_owned() })
    }

    /// Every option that it takes.
    pub fn takes(&self) -> impl Iterator<Item = &'static str> {
        let shared = if self.segment { SEGMENT_OPTIONS } else { &[] };
        self.options.iter().chain(shared).copied()
    }
}

impl NetworkDefinition {
    /// Makes a definition of what the user asks for; see [`Kind::define`].
    ///
    /// # Errors
    /// [`NetError::BadDefinition`], [`NetError::SubnetTaken`], [`NetError::InterfaceTaken`], [`NetError`].
    pub fn new(kind: &Kind, request: &Request<'_>, autostart: bool) -> Result<Self, NetError> {
        let definition = Self { kind: kind.name.to_owned(), autostart, options: (kind.define)(request)? };
        let claim = definition.open(request.network)?.claim();
        refuse_collisions(&claim, request.view, request.others)?;
        Ok(definition)
    }

    /// The network.
    ///
    /// # Errors
    /// [`NetError::NoSuchKind`], [`NetError::BadDefinition`].
    pub fn open(&self, name: &Name) -> Opened {
        (Kind::named(&self.kind)?.open)(name, self.options.clone())
    }
}

/// What this host lacks for a kind, in words: programs, modules of the kernel, the device of taps.
pub fn missing(kind: &Kind) -> Vec<String> {
    let programs = kind.programs.iter().filter(|program| !host::program::is_installed(program));
    let mut missing: Vec<String> = programs.map(|program| format!("the program {program}")).collect();
    let modules = kind.modules.iter().filter(|module| !modules::can_be_had(module));
    missing.extend(modules.map(|module| format!("the kernel module {module}")));
    if kind.modules.contains(&"tun") {
        missing.extend(crate::tap::missing());
    }
    missing
}

/// Refuses what the host or another network has already.
///
/// # Errors
/// [`NetError::SubnetTaken`], [`NetError::InterfaceTaken`].
pub fn refuse_collisions(claim: &Claim, view: &HostView, others: &[Claim]) -> Result<(), NetError> {
    let own: Vec<&IfName> = claim.interfaces.iter().collect();
    for subnet in &claim.subnets {
        let theirs = others.iter().filter(|other| other.network != claim.network);
        let other = theirs
            .flat_map(|other| other.subnets.iter().map(move |subnet| (&other.network, subnet)))
            .find(|(_, taken)| overlap(taken, subnet))
            .map(|(network, taken)| format!("the subnet {} of network {network}", taken.trunc()));
        if let Some(user) = other.or_else(|| view.user_of(subnet, &own)) {
            let (network, subnet) = (claim.network.clone(), subnet.trunc());
            return Err(NetError::SubnetTaken { network, subnet, user });
        }
    }
    for name in &claim.interfaces {
        let mut theirs = others.iter().filter(|other| other.network != claim.network);
        if let Some(other) = theirs.find(|other| other.interfaces.contains(name)) {
            let why = format!("belongs to network {}", other.network);
            return Err(NetError::InterfaceTaken { name: name.clone(), why });
        }
    }
    Ok(())
}

/// The options of a kind; one that it does not take is told with those that it does.
fn options<T: DeserializeOwned>(kind: &Kind, network: &Name, options: Table) -> Result<T, NetError> {
    options.try_into().map_err(|fault: toml::de::Error| {
        let Some((unknown, _)) = fault.message().split_once(", expected") else {
            // "… in `subnet`" is on a line of its own.
            return bad(network, fault.to_string().trim().replace('\n', " "));
        };
        let takes: Vec<String> = kind.takes().map(|option| format!("--{option}")).collect();
        let fault = unknown.replace("field", "option");
        bad(network, format!("{fault}; a network of kind {} takes {}", kind.name, takes.join(", ")))
    })
}

fn bad(network: &Name, fault: impl Into<String>) -> NetError {
    NetError::BadDefinition { network: network.clone(), fault: fault.into() }
}

fn refused(network: &Name, why: impl Into<String>) -> NetError {
    NetError::Refused { network: network.clone(), why: why.into() }
}

/// The options of a completed definition.
fn table(network: &Name, options: &impl Serialize) -> Result<Table, NetError> {
    Table::try_from(options).map_err(|fault| bad(network, fault.to_string()))
}

/// Refuses wishes for a port that only a network with VLANs can fulfil.
fn refuse_vlans(network: &Name, kind: &Kind, request: &PortRequest) -> Result<(), NetError> {
    match request.vlan.is_none() && request.trunk.is_empty() {
        true => Ok(()),
        false => Err(refused(
            network,
            format!(
                "a network of kind {} has no VLANs for its ports; one of kind vlan or ovs has",
                kind.name
            ),
        )),
    }
}

/// An identifier of a VLAN that frames can carry (IEEE 802.1Q).
fn check_vlan(network: &Name, id: u16) -> Result<(), NetError> {
    match (1..=4094).contains(&id) {
        true => Ok(()),
        false => Err(bad(network, format!("{id} is no VLAN; VLANs are 1 to 4094"))),
    }
}

/// An interface that has to be there, and free to become a port of our bridge.
fn free_uplink<'a>(
    network: &Name,
    view: &'a HostView,
    uplink: &IfName,
    bridge: &IfName,
) -> Result<&'a crate::LinkSeen, NetError> {
    let link = view.link(uplink).ok_or_else(|| NetError::NoInterface { name: uplink.clone() })?;
    let in_ours = view.link(bridge).is_some_and(|bridge| link.controller == Some(bridge.index));
    if link.controller.is_some() && !in_ours {
        let why = "is a port of another bridge or bond".to_owned();
        return Err(NetError::InterfaceTaken { name: uplink.clone(), why });
    }
    let global = |address: &IpNet| !matches!(address, IpNet::V6(v6) if v6.addr().is_unicast_link_local());
    if let Some(address) = view.addresses_of(link.index).find(global) {
        let why = format!(
            "{uplink} has the host's address {address}, which would be cut off in a bridge; move it to a bridge of your \
             own and define the network on that one with --bridge, or use a network of kind macvtap"
        );
        return Err(refused(network, why));
    }
    Ok(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_name_of_its_own_and_is_found_by_it() {
        for kind in KINDS {
            assert_eq!(Kind::named(kind.name).unwrap().name, kind.name);
            assert!(!kind.about.is_empty());
        }
        assert!(matches!(Kind::named("NAT"), Err(NetError::NoSuchKind { .. })));
        let mut names: Vec<&str> = KINDS.iter().map(|kind| kind.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), KINDS.len());
    }
}
