//! `routed`: the host routes between the guests' subnet and the outside, which has to know the way.

use std::net::IpAddr;

use model::Name;

use super::nat::{Outward, protocol};
use super::segment::Segment;
use super::{Claim, Kind, Network, Opened, Request, refuse_vlans};
use crate::nft::{Table, accept, fence, meta, payload, prefix};
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
        let mut passing = Vec::new();
        for subnet in self.segment.subnets() {
            let (protocol, within) = (protocol(&subnet), prefix(&subnet));
            let mut out = vec![iif(), payload(protocol, "saddr", "==", &within)];
            out.extend(self.outward.way("oifname"));
            out.push(accept());
            passing.push(out);
            let mut back = vec![oif(), payload(protocol, "daddr", "==", &within)];
            back.extend(self.outward.way("iifname"));
            back.push(accept());
            passing.push(back);
        }
        let mut parts = vec![Part::Table(Table::inet(&self.name, fence(bridge, passing)))];
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
