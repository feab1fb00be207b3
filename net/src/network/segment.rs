//! A bridge of one's own with addresses, DHCP and DNS: what several kinds have in common.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use model::Name;
use serde::{Deserialize, Serialize};
use toml::Table;

use super::{Claim, Request, bad};
use crate::bridge_port::BridgePort;
use crate::dnsmasq::Dnsmasq;
use crate::link::{Link, LinkForm};
use crate::netlink::overlap;
use crate::part::Part;
use crate::port::{PortRequest, Tap, rates};
use crate::{IfName, MacAddress, NetError};

pub(super) const OPTIONS: &[&str] =
    &["bridge", "mac", "mtu", "stp", "subnet", "subnet6", "domain", "no-dhcp", "dhcp", "host", "name"];

/// Where a subnet is chosen that the user left open.
const CHOICE: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 99, 0, 0), 16);
/// Bounds of an MTU: what IPv6 needs, or IPv4 where there is no IPv6, and the most that a frame can be.
const MTU: std::ops::RangeInclusive<u32> = 576..=65_535;
/// How long a guest has an address before it asks again.
const LEASE: &str = "1h";
/// Addresses for guests in a subnet of IPv6.
const V6_GUESTS: (u128, u128) = (0x100, 0xffff);

/// A bridge with what is on it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Segment {
    /// The bridge's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bridge: Option<IfName>,
    /// The bridge's address: without one it takes that of a port, and changes it with the ports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// The MTU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Whether it speaks the spanning tree protocol.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stp: bool,
    /// The IPv4 subnet; the host has the address that is named in it, or the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet: Option<Ipv4Net>,
    /// The IPv6 subnet, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet6: Option<Ipv6Net>,
    /// The domain of the guests' names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Whether guests are given no addresses.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_dhcp: bool,
    /// Ranges of addresses that guests are given; where there is none, all of the subnet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dhcp: Vec<Range>,
    /// Guests that always have the same address.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host: Vec<Fixed>,
    /// Names beside those of guests.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub name: BTreeMap<String, IpAddr>,
}

/// Addresses from one to another, both included: `10.99.1.100-10.99.1.200`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Range {
    first: IpAddr,
    last: IpAddr,
}

/// A guest that always has the same address: `52:54:00:11:22:33,10.99.1.5` or `…,10.99.1.5,NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fixed {
    mac: MacAddress,
    address: IpAddr,
    name: Option<String>,
}

/// The text is no range of addresses, or no guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// No range.
    #[error("{0:?} is no range of addresses; write for example 10.99.1.100-10.99.1.200")]
    Range(String),
    /// No guest.
    #[error("{0:?} is no guest; write MAC,ADDRESS or MAC,ADDRESS,NAME")]
    Fixed(String),
}

impl FromStr for Range {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let parsed = text.split_once('-').and_then(|(first, last)| {
            let (first, last): (IpAddr, IpAddr) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            (first.is_ipv4() == last.is_ipv4() && first <= last).then_some(Self { first, last })
        });
        parsed.ok_or_else(|| ParseError::Range(text.to_owned()))
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for Fixed {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut words = text.split(',').map(str::trim);
        let parsed = (|| {
            let (mac, address) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
            let name = words.next().map(str::to_owned);
            let whole = words.next().is_none() && name.as_deref().is_none_or(is_dns_name);
            whole.then_some(Self { mac, address, name })
        })();
        parsed.ok_or_else(|| ParseError::Fixed(text.to_owned()))
    }
}

impl fmt::Display for Fixed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}", self.mac, self.address)?;
        self.name.as_ref().map_or(Ok(()), |name| write!(f, ",{name}"))
    }
}

macro_rules! as_text {
    ($type:ty) => {
        impl TryFrom<String> for $type {
            type Error = ParseError;

            fn try_from(text: String) -> Result<Self, ParseError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    };
}
as_text!(Range);
as_text!(Fixed);

/// Labels of letters, digits and hyphens (RFC 1123): nothing that means something in a configuration.
fn is_dns_name(text: &str) -> bool {
    let label = |label: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
        (1..=63).contains(&label.len()) && label.chars().all(plain) && !label.starts_with('-')
    };
    text.len() <= 253 && text.split('.').all(label)
}

/// The options of `own` and those of the segment, apart.
pub(super) fn split(options: Table) -> (Table, Table) {
    options.into_iter().partition(|(key, _)| OPTIONS.contains(&key.as_str()))
}

impl Segment {
    /// Checks what the definition says by itself.
    pub(super) fn check(self, network: &Name) -> Result<Self, NetError> {
        if let Some(mtu) = self.mtu.filter(|mtu| !MTU.contains(mtu)) {
            let (least, most) = (MTU.start(), MTU.end());
            return Err(bad(network, format!("the MTU {mtu} is not between {least} and {most}")));
        }
        if let Some(domain) = self.domain.iter().chain(self.name.keys()).find(|name| !is_dns_name(name)) {
            return Err(bad(network, format!("{domain:?} is no name in the DNS")));
        }
        if self.subnet.is_some_and(|subnet| subnet.prefix_len() > 30) {
            return Err(bad(
                network,
                "the subnet has no room for guests; a prefix of 30 bits is the longest",
            ));
        }
        if self.subnet6.is_some_and(|subnet| subnet.prefix_len() > 112) {
            return Err(bad(
                network,
                "the IPv6 subnet is too small; 64 bits of prefix are usual, 112 the most",
            ));
        }
        let needs_subnet = [(!self.dhcp.is_empty(), "dhcp"), (!self.host.is_empty(), "host")];
        if let Some((_, option)) = needs_subnet.iter().find(|(given, _)| *given && self.subnets().is_empty())
        {
            return Err(bad(network, format!("--{option} needs a subnet: add --subnet")));
        }
        let given = self.dhcp.iter().flat_map(|range| [range.first, range.last]);
        for address in given.chain(self.host.iter().map(|host| host.address)) {
            self.check_guest(network, address)?;
        }
        let mut taken: Vec<(MacAddress, IpAddr)> = Vec::new();
        for host in &self.host {
            if let Some((mac, address)) = taken.iter().find(|(mac, address)| {
                *address == host.address || (*mac == host.mac && is_same_family(address, &host.address))
            }) {
                return Err(bad(network, format!("{host} collides with {mac},{address}")));
            }
            taken.push((host.mac, host.address));
        }
        Ok(self)
    }

    fn check_guest(&self, network: &Name, address: IpAddr) -> Result<(), NetError> {
        let subnets = self.subnets();
        let inside = subnets.iter().find(|subnet| subnet.contains(&address));
        let Some(subnet) = inside else {
            let subnets: Vec<String> = subnets.iter().map(|subnet| subnet.trunc().to_string()).collect();
            return Err(bad(network, format!("{address} is outside the subnet {}", subnets.join(", "))));
        };
        if address == subnet.addr() {
            return Err(bad(network, format!("{address} is the host's own address in {}", subnet.trunc())));
        }
        if address.is_ipv4() && (address == subnet.network() || address == subnet.broadcast()) {
            return Err(bad(network, format!("{address} is no address for a guest in {}", subnet.trunc())));
        }
        Ok(())
    }

    /// Chooses what was left open.
    pub(super) fn complete(mut self, request: &Request<'_>, wants_subnet: bool) -> Result<Self, NetError> {
        let name = request.network;
        if self.bridge.is_none() {
            self.bridge = Some(free_name(request)?);
        }
        if self.mac.is_none() {
            self.mac = Some(free_mac(request));
        }
        if wants_subnet && self.subnet.is_none() && self.subnet6.is_none() {
            self.subnet = Some(free_subnet(request)?);
        }
        self.check(name)
    }

    /// The subnets, with the host's own address in each.
    pub(super) fn subnets(&self) -> Vec<IpNet> {
        let v4 = self.subnet.map(|subnet| {
            let first = || subnet.hosts().next().unwrap_or(subnet.addr());
            let own = if subnet.addr() == subnet.network() { first() } else { subnet.addr() };
            Ipv4Net::new(own, subnet.prefix_len()).map_or(IpNet::V4(subnet), IpNet::V4)
        });
        let v6 = self.subnet6.map(|subnet| {
            let first = || (u128::from(subnet.network()) + 1).into();
            let own = if subnet.addr() == subnet.network() { first() } else { subnet.addr() };
            Ipv6Net::new(own, subnet.prefix_len()).map_or(IpNet::V6(subnet), IpNet::V6)
        });
        v4.into_iter().chain(v6).collect()
    }

    /// The bridge and its subnets, for people.
    pub(super) fn summary(&self) -> String {
        let bridge = self.bridge.as_ref().map(ToString::to_string);
        let subnets = self.subnets().into_iter().map(|subnet| subnet.trunc().to_string());
        bridge.into_iter().chain(subnets).collect::<Vec<_>>().join(", ")
    }

    pub(super) fn claim(&self, network: &Name) -> Claim {
        Claim {
            network: network.clone(),
            subnets: self.subnets(),
            interfaces: self.bridge.iter().cloned().collect(),
            macs: self.mac.into_iter().chain(self.host.iter().map(|host| host.mac)).collect(),
        }
    }

    /// The bridge's name; there is one once the definition is complete.
    pub(super) fn bridge(&self, network: &Name) -> Result<&IfName, NetError> {
        self.bridge.as_ref().ok_or_else(|| bad(network, "it names no bridge"))
    }

    /// The bridge and its addresses.
    pub(super) fn bridge_parts(&self, network: &Name, vlan_filtering: bool) -> Result<Vec<Part>, NetError> {
        let name = self.bridge(network)?;
        let mut parts = vec![Part::Link(Link {
            name: name.clone(),
            network: network.clone(),
            form: LinkForm::Bridge { stp: self.stp, vlan_filtering },
            mac: self.mac,
            mtu: self.mtu,
            bridge: None,
            ipv6: self.subnet6.is_some(),
        })];
        let addresses = self.subnets().into_iter();
        parts.extend(addresses.map(|address| Part::Address { link: name.clone(), address }));
        Ok(parts)
    }

    /// DHCP and DNS, where there are addresses. `leads_out` says whether guests reach anything beyond the host.
    pub(super) fn server(&self, network: &Name, leads_out: bool) -> Result<Option<Part>, NetError> {
        let subnets = self.subnets();
        if subnets.is_empty() || (self.no_dhcp && self.domain.is_none() && self.name.is_empty()) {
            return Ok(None);
        }
        let mut config = vec![
            format!("interface={}", self.bridge(network)?),
            "except-interface=lo".into(),
            "bind-dynamic".into(),
            // The host's names are the host's.
            "no-hosts".into(),
            "domain-needed".into(),
            "bogus-priv".into(),
        ];
        if let Some(domain) = &self.domain {
            config.extend([format!("domain={domain}"), format!("local=/{domain}/"), "expand-hosts".into()]);
        }
        config.extend(self.name.iter().map(|(name, address)| format!("host-record={name},{address}")));
        if !leads_out {
            // Nobody to ask, and no way out to announce.
            config.extend(["no-resolv".into(), "dhcp-option=option:router".into()]);
        }
        if !self.no_dhcp {
            config.extend(["dhcp-authoritative".into(), "dhcp-no-override".into(), "no-ping".into()]);
            config.push("dhcp-lease-max=65536".into());
            config.extend(subnets.iter().flat_map(|subnet| self.ranges(subnet)));
            if self.subnet6.is_some() {
                config.push("enable-ra".into());
            }
            config.extend(self.host.iter().map(|host| {
                let name = host.name.as_ref().map(|name| format!(",{name}")).unwrap_or_default();
                match host.address {
                    IpAddr::V4(address) => format!("dhcp-host={},{address}{name}", host.mac),
                    IpAddr::V6(address) => format!("dhcp-host={},[{address}]{name}", host.mac),
                }
            }));
        }
        Ok(Some(Part::Dnsmasq(Dnsmasq { network: network.clone(), config })))
    }

    fn ranges(&self, subnet: &IpNet) -> Vec<String> {
        let mut given: Vec<Range> =
            self.dhcp.iter().copied().filter(|range| subnet.contains(&range.first)).collect();
        if given.is_empty() {
            given.push(whole(subnet));
        }
        let length = match subnet {
            IpNet::V4(subnet) => subnet.netmask().to_string(),
            IpNet::V6(subnet) => subnet.prefix_len().to_string(),
        };
        given
            .iter()
            .map(|range| format!("dhcp-range={},{},{length},{LEASE}", range.first, range.last))
            .collect()
    }

    /// The addresses that are fixed for a guest.
    pub(super) fn fixed(&self, mac: MacAddress) -> Vec<IpAddr> {
        self.host.iter().filter(|host| host.mac == mac).map(|host| host.address).collect()
    }

    /// A tap in the bridge.
    pub(super) fn port(
        &self,
        network: &Name,
        port: &IfName,
        request: &PortRequest,
    ) -> Result<Vec<Part>, NetError> {
        Ok(tap_in_bridge(network, self.bridge(network)?, self.mtu, port, request))
    }
}

/// A tap, and what it may do as a port of a bridge.
pub(super) fn tap_in_bridge(
    network: &Name,
    bridge: &IfName,
    mtu: Option<u32>,
    port: &IfName,
    request: &PortRequest,
) -> Vec<Part> {
    let tap = Tap {
        name: port.clone(),
        network: network.clone(),
        multi_queue: request.multi_queue,
        owner: request.owner,
        mtu: request.mtu.or(mtu),
    };
    let in_bridge = BridgePort {
        name: port.clone(),
        bridge: bridge.clone(),
        isolated: request.isolated,
        vlan: request.vlan,
        trunk: request.trunk.clone(),
    };
    let mut parts = vec![Part::Tap(tap)];
    parts.extend(rates(network, port, request));
    parts.push(Part::BridgePort(in_bridge));
    parts
}

/// All of a subnet that guests can have, on the larger side of the host's own address.
fn whole(subnet: &IpNet) -> Range {
    match subnet {
        IpNet::V4(subnet) => {
            let (first, last) = (u32::from(subnet.network()) + 1, u32::from(subnet.broadcast()) - 1);
            let own = u32::from(subnet.addr());
            let (first, last) = if own - first >= last - own { (first, own - 1) } else { (own + 1, last) };
            Range { first: Ipv4Addr::from(first).into(), last: Ipv4Addr::from(last).into() }
        }
        IpNet::V6(subnet) => {
            let base = u128::from(subnet.network());
            let at = |offset: u128| IpAddr::V6((base + offset).into());
            Range { first: at(V6_GUESTS.0), last: at(V6_GUESTS.1.min(!0 >> subnet.prefix_len())) }
        }
    }
}

fn is_same_family(a: &IpAddr, b: &IpAddr) -> bool {
    a.is_ipv4() == b.is_ipv4()
}

fn free_name(request: &Request<'_>) -> Result<IfName, NetError> {
    let name = IfName::derived("sbr-", request.network.as_str());
    if request.view.link(&name).is_some() {
        let why = "was to be the network's bridge; name another one with --bridge".to_owned();
        return Err(NetError::InterfaceTaken { name, why });
    }
    Ok(name)
}

/// An address that nobody on this host has.
fn free_mac(request: &Request<'_>) -> MacAddress {
    let taken = |mac: MacAddress| {
        request.view.has_mac(mac) || request.others.iter().any(|other| other.macs.contains(&mac))
    };
    let mut seed = blake3::hash(&request.dice.to_ne_bytes());
    loop {
        let mac = MacAddress::of_qemu([seed.as_bytes()[0], seed.as_bytes()[1], seed.as_bytes()[2]]);
        if !taken(mac) {
            return mac;
        }
        seed = blake3::hash(seed.as_bytes());
    }
}

fn free_subnet(request: &Request<'_>) -> Result<Ipv4Net, NetError> {
    let within = Ipv4Net::new(CHOICE.0, CHOICE.1).unwrap_or_default();
    let taken = |subnet: &Ipv4Net| {
        let subnet = IpNet::V4(*subnet);
        let claimed = request.others.iter().flat_map(|other| &other.subnets);
        claimed.into_iter().any(|other| overlap(other, &subnet))
            || request.view.user_of(&subnet, &[]).is_some()
    };
    let mut subnets = within.subnets(24).into_iter().flatten().skip(1);
    subnets
        .find(|subnet| !taken(subnet))
        .ok_or_else(|| NetError::NoFreeSubnet { network: request.network.clone(), within: IpNet::V4(within) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> Name {
        "n1".parse().unwrap()
    }

    fn segment(text: &str) -> Result<Segment, NetError> {
        toml::from_str::<Segment>(text).unwrap().check(&name())
    }

    #[test]
    fn the_host_has_the_first_address_or_the_one_that_is_named() {
        let own = |text: &str| segment(text).unwrap().subnets()[0].to_string();
        assert_eq!(own("subnet = \"10.99.1.0/24\""), "10.99.1.1/24");
        assert_eq!(own("subnet = \"10.99.1.254/24\""), "10.99.1.254/24");
        assert_eq!(own("subnet6 = \"fd00:99::/64\""), "fd00:99::1/64");
    }

    #[test]
    fn guests_have_what_the_host_leaves() {
        let range = |text: &str| whole(&text.parse().unwrap()).to_string();
        assert_eq!(range("10.99.1.1/24"), "10.99.1.2-10.99.1.254");
        assert_eq!(range("10.99.1.254/24"), "10.99.1.1-10.99.1.253");
        assert_eq!(range("10.99.1.100/24"), "10.99.1.101-10.99.1.254");
        assert_eq!(range("10.99.1.1/30"), "10.99.1.2-10.99.1.2");
        assert_eq!(range("fd00::1/64"), "fd00::100-fd00::ffff");
        assert_eq!(range("fd00::1/112"), "fd00::100-fd00::ffff");
    }

    #[test]
    fn what_does_not_fit_into_the_subnet_is_refused() {
        for (text, why) in [
            ("subnet = \"10.99.1.0/24\"\ndhcp = [\"10.99.2.1-10.99.2.9\"]", "outside the subnet"),
            ("subnet = \"10.99.1.0/24\"\ndhcp = [\"10.99.1.1-10.99.1.9\"]", "the host's own address"),
            (
                "subnet = \"10.99.1.0/24\"\nhost = [\"52:54:00:00:00:01,10.99.1.255\"]",
                "no address for a guest",
            ),
            ("dhcp = [\"10.99.1.2-10.99.1.9\"]", "needs a subnet"),
            ("subnet = \"10.99.1.0/31\"", "no room"),
            ("mtu = 60", "the MTU 60"),
            ("domain = \"a b\"", "no name"),
            (
                "subnet = \"10.99.1.0/24\"\nhost = [\"52:54:00:00:00:01,10.99.1.5\", \"52:54:00:00:00:02,10.99.1.5\"]",
                "collides",
            ),
        ] {
            let fault = segment(text).unwrap_err().to_string();
            assert!(fault.contains(why), "{text}: {fault}");
        }
        assert!("10.0.0.9-10.0.0.1".parse::<Range>().is_err());
        assert!("52:54:00:00:00:01,10.0.0.1,a\nb".parse::<Fixed>().is_err());
    }

    #[test]
    fn a_definition_is_read_as_it_is_written() {
        let text = "bridge = \"sbr-n1\"\nsubnet = \"10.99.1.0/24\"\ndhcp = [\"10.99.1.100-10.99.1.200\"]\n\
            host = [\"52:54:00:00:00:01,10.99.1.5,vm1\"]\n\n[name]\n\"gw.lab\" = \"10.99.1.1\"\n";
        let segment: Segment = toml::from_str(text).unwrap();
        assert_eq!(toml::to_string(&segment).unwrap(), text);
    }
}
