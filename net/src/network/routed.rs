//! `routed`: the host routes between the guests' subnet and the outside, which has to know the way.

use std::net::IpAddr;

use model::Name;

use super::nat::{Outward, protocol};
use super::segment::Segment;
use super::{Claim, Kind, Network, Opened, Request, refuse_vlans};
use crate::nft::{Table, accept, base_chain, meta, payload, prefix, reject, rule};
use crate::part::Part;
use crate::port::PortRequest;
use crate::{HostView, IfName, MacAddress, NetError};

pub(super) const KIND: Kind = Kind {
    name: "routed",
    about: "the host routes the guests' subnet; the outside has to know the way to it",
    options: &["uplink"],
    segment: true,
    programs: &["nft", "dnsmasq"],
    modules: &["bridge", "tun", "nf_tables"],
    define,
    open,
};

#[derive(Debug)]
struct Routed {
    name: Name,
    segment: Segment,
    outward: Outward,
}

fn define(request: &Request<'_>) -> Result<toml::Table, NetError> {
    Outward::define(&KIND, request)
}

fn open(name: &Name, table: toml::Table) -> Opened {
    let (segment, outward) = Outward::open(&KIND, name, table)?;
    Ok(Box::new(Routed { name: name.clone(), segment, outward }))
}

impl Network for Routed {
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
        let bridge = self.segment.bridge(&self.name)?;
        let (iif, oif) = (|| meta("iifname", "==", bridge), || meta("oifname", "==", bridge));
        let mut objects = vec![base_chain("forward", "filter", "forward", 0)];
        objects.push(rule("forward", vec![iif(), oif(), accept()]));
        for subnet in self.segment.subnets() {
            let (protocol, within) = (protocol(&subnet), prefix(&subnet));
            let mut out = vec![iif(), payload(protocol, "saddr", "==", &within)];
            out.extend(self.outward.way("oifname"));
            objects.push(rule("forward", [out, vec![accept()]].concat()));
            let mut back = vec![oif(), payload(protocol, "daddr", "==", &within)];
            back.extend(self.outward.way("iifname"));
            objects.push(rule("forward", [back, vec![accept()]].concat()));
        }
        objects.push(rule("forward", vec![iif(), reject()]));
        objects.push(rule("forward", vec![oif(), reject()]));
        let mut parts = vec![Part::Table(Table::inet(&self.name, objects))];
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
