//! `nat`: guests reach the outside with the host's address, and are not reached from there.

use std::net::IpAddr;

use ipnet::IpNet;
use model::Name;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::segment::{Segment, split};
use super::{Claim, Kind, Network, Opened, Request, options, refuse_vlans, table};
use crate::nft::{Table, accept, base_chain, established, fence, masquerade, meta, payload, prefix, rule};
use crate::part::Part;
use crate::port::PortRequest;
use crate::sysctl::Forwarding;
use crate::{HostView, IfName, MacAddress, NetError};

pub(super) const KIND: Kind = Kind {
    name: "nat",
    about: "guests reach the outside with the host's address, and are not reached from there",
    options: &["uplink"],
    segment: true,
    programs: &["nft", "dnsmasq"],
    modules: &["bridge", "tun", "nf_tables", "nft_masq", "nft_ct"],
    define,
    open,
};

/// Where sources are translated: after all that has to see the guest's own address.
const SOURCE_NAT: i32 = 100;
/// Groups and broadcasts, which no router passes on.
const LOCAL_ONLY: [&str; 2] = ["224.0.0.0/24", "255.255.255.255/32"];

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Outward {
    /// Where guests may go out; without it, wherever the host's routes lead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) uplink: Option<IfName>,
}

#[derive(Debug)]
struct Nat {
    name: Name,
    segment: Segment,
    outward: Outward,
}

fn define(request: &Request<'_>) -> Result<toml::Table, NetError> {
    Outward::define(&KIND, request)
}

fn open(name: &Name, table: toml::Table) -> Opened {
    let (segment, outward) = Outward::open(&KIND, name, table)?;
    Ok(Box::new(Nat { name: name.clone(), segment, outward }))
}

impl Outward {
    /// Completes a definition of a kind that leads out.
    pub(super) fn define(kind: &Kind, request: &Request<'_>) -> Result<toml::Table, NetError> {
        let (segment, own) = split(request.options.clone());
        let own: Self = options(kind, request.network, own)?;
        let segment: Segment = options(kind, request.network, segment)?;
        let mut table = table(request.network, &own)?;
        table.extend(super::table(request.network, &segment.complete(request, true)?)?);
        Ok(table)
    }

    pub(super) fn open(kind: &Kind, name: &Name, table: toml::Table) -> Result<(Segment, Self), NetError> {
        let (segment, own) = split(table);
        let segment: Segment = options(kind, name, segment)?;
        let segment = segment.check(name)?;
        if segment.subnets().is_empty() {
            return Err(super::bad(name, format!("a network of kind {} needs a subnet", kind.name)));
        }
        Ok((segment, options(kind, name, own)?))
    }

    /// Forwarding between the bridge and where the host's routes lead.
    pub(super) fn forwarding(
        &self,
        network: &Name,
        segment: &Segment,
        view: &HostView,
    ) -> Result<Part, NetError> {
        let (v4, v6) = (segment.subnet.is_some(), segment.subnet6.is_some());
        let uplinks = match &self.uplink {
            Some(uplink) => {
                view.link(uplink).ok_or_else(|| NetError::NoInterface { name: uplink.clone() })?;
                vec![uplink.clone()]
            }
            None => {
                let mut links = if v4 { view.default_links(false) } else { Vec::new() };
                links.extend(if v6 { view.default_links(true) } else { Vec::new() });
                links.sort();
                links.dedup();
                links
            }
        };
        let bridge = segment.bridge(network)?.clone();
        Ok(Part::Forwarding(Forwarding { network: network.clone(), bridge, uplinks, v4, v6 }))
    }

    /// `oifname UPLINK`, where there is one.
    pub(super) fn way(&self, key: &str) -> Option<serde_json::Value> {
        self.uplink.as_ref().map(|uplink| meta(key, "==", uplink))
    }
}

/// The protocol in whose header an address of the subnet stands.
pub(super) fn protocol(subnet: &IpNet) -> &'static str {
    match subnet {
        IpNet::V4(_) => "ip",
        IpNet::V6(_) => "ip6",
    }
}

impl Nat {
    fn table(&self) -> Result<Table, NetError> {
        let bridge = self.segment.bridge(&self.name)?;
        let (iif, oif) = (|| meta("iifname", "==", bridge), || meta("oifname", "==", bridge));
        let mut passing = Vec::new();
        let mut translating = vec![base_chain("postrouting", "nat", "postrouting", SOURCE_NAT)];
        for subnet in self.segment.subnets() {
            let (protocol, within) = (protocol(&subnet), prefix(&subnet));
            let mut out = vec![iif(), payload(protocol, "saddr", "==", within.clone())];
            out.extend(self.outward.way("oifname"));
            out.push(accept());
            passing.push(out);
            passing.push(vec![
                oif(),
                payload(protocol, "daddr", "==", within.clone()),
                established(),
                accept(),
            ]);
            let mut outside = vec![within.clone()];
            if subnet.addr().is_ipv4() {
                outside.extend(LOCAL_ONLY.iter().filter_map(|net| Some(prefix(&net.parse().ok()?))));
            }
            let source = payload(protocol, "saddr", "==", within);
            let elsewhere = payload(protocol, "daddr", "!=", json!({ "set": outside }));
            translating.push(rule("postrouting", vec![source, elsewhere, masquerade()]));
        }
        Ok(Table::inet(&self.name, [fence(bridge, passing), translating].concat()))
    }
}

impl Network for Nat {
    fn kind(&self) -> &'static str {
        KIND.name
    }

    fn summary(&self) -> String {
        self.segment.summary()
    }

    fn claim(&self) -> Claim {
        self.segment.claim(&self.name)
    }

    fn parts(&self, view: &HostView) -> Result<Vec<Part>, NetError> {
        let mut parts = vec![Part::Table(self.table()?)];
        parts.extend(self.segment.bridge_parts(&self.name, false)?);
        parts.push(self.outward.forwarding(&self.name, &self.segment, view)?);
        parts.extend(self.segment.server(&self.name, true)?);
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
