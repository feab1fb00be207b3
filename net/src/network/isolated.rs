//! `isolated`: a bridge that leads nowhere. Guests reach each other, and the host where it has an address there.

use std::net::IpAddr;

use model::Name;

use super::segment::Segment;
use super::{Claim, Kind, Network, Opened, Request, options, refuse_vlans, table};
use crate::nft::{Table, fence};
use crate::part::Part;
use crate::port::PortRequest;
use crate::{HostView, IfName, MacAddress, NetError};

pub(super) const KIND: Kind = Kind {
    name: "isolated",
    about: "a bridge that leads nowhere: guests reach each other and the host",
    options: &[],
    segment: true,
    programs: &["nft", "dnsmasq"],
    modules: &["bridge", "tun", "nf_tables"],
    define,
    open,
};

#[derive(Debug)]
struct Isolated {
    name: Name,
    segment: Segment,
}

fn define(request: &Request<'_>) -> Result<toml::Table, NetError> {
    let segment: Segment = options(&KIND, request.network, request.options.clone())?;
    table(request.network, &segment.complete(request, false)?)
}

fn open(name: &Name, table: toml::Table) -> Opened {
    let segment: Segment = options(&KIND, name, table)?;
    Ok(Box::new(Isolated { name: name.clone(), segment: segment.check(name)? }))
}

impl Network for Isolated {
    fn kind(&self) -> &'static str {
        KIND.name
    }

    fn summary(&self) -> String {
        self.segment.summary()
    }

    fn claim(&self) -> Claim {
        self.segment.claim(&self.name)
    }

    fn parts(&self, _: &HostView) -> Result<Vec<Part>, NetError> {
        let bridge = self.segment.bridge(&self.name)?;
        let mut parts = vec![Part::Table(Table::inet(&self.name, fence(bridge, [])))];
        parts.extend(self.segment.bridge_parts(&self.name, false)?);
        parts.extend(self.segment.server(&self.name, false)?);
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
