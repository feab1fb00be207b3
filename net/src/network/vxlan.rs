//! `vxlan`: a bridge that spans hosts, through a tunnel to each (RFC 7348).

use std::net::IpAddr;

use model::Name;
use serde::{Deserialize, Serialize};

use super::segment::{Segment, split};
use super::{Claim, Kind, Network, Opened, Request, bad, options, refuse_vlans, table};
use crate::link::{Link, LinkForm};
use crate::part::Part;
use crate::port::PortRequest;
use crate::{HostView, IfName, MacAddress, NetError};

pub(super) const KIND: Kind = Kind {
    name: "vxlan",
    about: "a bridge that spans hosts, through a tunnel to each peer or through a multicast group",
    options: &["vni", "local", "peer", "group", "uplink", "port"],
    segment: true,
    programs: &["dnsmasq"],
    modules: &["bridge", "tun", "vxlan"],
    define,
    open,
};

/// The port that was assigned to VXLAN.
const PORT: u16 = 4789;
/// What the tunnel's headers take of each frame, over IPv4 and over IPv6.
const HEADERS: (u32, u32) = (50, 70);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    vni: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    local: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    peer: Vec<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uplink: Option<IfName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
}

#[derive(Debug)]
struct Vxlan {
    name: Name,
    segment: Segment,
    options: Options,
}

fn define(request: &Request<'_>) -> Result<toml::Table, NetError> {
    let (segment, own) = split(request.options.clone());
    let own: Options = options(&KIND, request.network, own)?;
    let segment: Segment = options(&KIND, request.network, segment)?;
    let mut whole = table(request.network, &own)?;
    whole.extend(table(request.network, &segment.complete(request, false)?)?);
    Ok(whole)
}

fn open(name: &Name, table: toml::Table) -> Opened {
    let (segment, own) = split(table);
    let own: Options = options(&KIND, name, own)?;
    let segment: Segment = options(&KIND, name, segment)?;
    let wrong = |why: &str| Err(bad(name, why));
    if own.vni == 0 || own.vni >= 1 << 24 {
        return wrong("--vni is 1 to 16777215");
    }
    if own.peer.is_empty() == own.group.is_none() {
        return wrong("name the other hosts with --peer, or the group where they are found with --group");
    }
    if own.group.is_some_and(|group| !group.is_multicast()) {
        return wrong("--group is the address of a multicast group, for example 239.1.1.1");
    }
    if own.group.is_some() && own.uplink.is_none() {
        return wrong("a group is joined on an interface: name it with --uplink");
    }
    if own.peer.iter().any(IpAddr::is_multicast) {
        return wrong("--peer is the address of a host; a multicast group is named with --group");
    }
    let all: Vec<&IpAddr> = own.peer.iter().chain(&own.local).chain(&own.group).collect();
    if all.iter().any(|address| address.is_ipv4()) && all.iter().any(|address| address.is_ipv6()) {
        return wrong("a tunnel is over IPv4 or over IPv6; its addresses are of both");
    }
    Ok(Box::new(Vxlan { name: name.clone(), segment: segment.check(name)?, options: own }))
}

impl Vxlan {
    fn link_name(&self) -> IfName {
        IfName::derived("svx-", self.name.as_str())
    }

    /// What is left of the MTU below for a frame in the tunnel.
    fn mtu(&self, view: &HostView) -> u32 {
        let below = self.options.uplink.as_ref().and_then(|uplink| view.link(uplink)).map(|link| link.mtu);
        let v6 = self.options.peer.iter().chain(&self.options.group).any(IpAddr::is_ipv6);
        let headers = if v6 { HEADERS.1 } else { HEADERS.0 };
        self.segment.mtu.unwrap_or_else(|| below.unwrap_or(1500).saturating_sub(headers))
    }
}

impl Network for Vxlan {
    fn kind(&self) -> &'static str {
        KIND.name
    }

    fn summary(&self) -> String {
        let others = match &self.options.group {
            Some(group) => format!("group {group}"),
            None => format!("{} peers", self.options.peer.len()),
        };
        format!("{}, VXLAN {} with {others}", self.segment.summary(), self.options.vni)
    }

    fn claim(&self) -> Claim {
        let mut claim = self.segment.claim(&self.name);
        claim.interfaces.push(self.link_name());
        claim
    }

    fn parts(&self, view: &HostView) -> Result<Vec<Part>, NetError> {
        if let Some(uplink) = self.options.uplink.as_ref().filter(|uplink| view.link(uplink).is_none()) {
            return Err(NetError::NoInterface { name: uplink.clone() });
        }
        let mut segment = self.segment.clone();
        segment.mtu = Some(self.mtu(view));
        let mut parts = segment.bridge_parts(&self.name, false)?;
        parts.push(Part::Link(Link {
            name: self.link_name(),
            network: self.name.clone(),
            form: LinkForm::Vxlan {
                vni: self.options.vni,
                local: self.options.local,
                peers: self.options.peer.clone(),
                group: self.options.group,
                lower: self.options.uplink.clone(),
                port: self.options.port.unwrap_or(PORT),
            },
            mac: None,
            mtu: segment.mtu,
            bridge: Some(segment.bridge(&self.name)?.clone()),
            ipv6: false,
        }));
        parts.extend(segment.server(&self.name, false)?);
        Ok(parts)
    }

    fn fixed(&self, mac: MacAddress) -> Vec<IpAddr> {
        self.segment.fixed(mac)
    }

    fn port(&self, port: &IfName, request: &PortRequest) -> Result<Vec<Part>, NetError> {
        refuse_vlans(&self.name, &KIND, request)?;
        self.segment.port(&self.name, port, request)
    }
}
