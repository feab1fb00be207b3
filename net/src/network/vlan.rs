//! `vlan`: a bridge that keeps VLANs apart. Each port has a VLAN of its own, or several, tagged.

use model::Name;
use serde::{Deserialize, Serialize};

use super::segment::{Segment, split};
use super::{Claim, Kind, Network, Opened, Request, check_vlan, free_uplink, options, refused, table};
use crate::bridge_port::BridgePort;
use crate::link::Enslaved;
use crate::part::Part;
use crate::port::PortRequest;
use crate::{HostView, IfName, NetError};

pub(super) const KIND: Kind = Kind {
    name: "vlan",
    about: "a bridge that keeps VLANs apart, with a VLAN or a trunk for each port",
    options: &["uplink"],
    segment: true,
    programs: &[],
    modules: &["bridge", "tun", "8021q"],
    define,
    open,
};

/// Every VLAN there can be.
const ALL: (u16, u16) = (1, 4094);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    /// The interface that carries all VLANs, tagged.
    #[serde(skip_serializing_if = "Option::is_none")]
    uplink: Option<IfName>,
}

#[derive(Debug)]
struct Vlan {
    name: Name,
    segment: Segment,
    uplink: Option<IfName>,
}

fn define(request: &Request<'_>) -> Result<toml::Table, NetError> {
    let (segment, own) = split(request.options.clone());
    let own: Options = options(&KIND, request.network, own)?;
    let segment: Segment = options(&KIND, request.network, segment)?;
    let segment = segment.complete(request, false)?;
    if let Some(uplink) = &own.uplink {
        free_uplink(request.network, request.view, uplink, segment.bridge(request.network)?)?;
    }
    let mut whole = table(request.network, &own)?;
    whole.extend(table(request.network, &segment)?);
    Ok(whole)
}

fn open(name: &Name, table: toml::Table) -> Opened {
    let (segment, own) = split(table);
    let own: Options = options(&KIND, name, own)?;
    let segment: Segment = options(&KIND, name, segment)?;
    let segment = segment.check(name)?;
    if !segment.subnets().is_empty() {
        let why =
            "a bridge with VLANs has no subnet of its own; let one of its VLANs lead to a router".to_owned();
        return Err(super::bad(name, why));
    }
    Ok(Box::new(Vlan { name: name.clone(), segment, uplink: own.uplink }))
}

impl Network for Vlan {
    fn kind(&self) -> &'static str {
        KIND.name
    }

    fn summary(&self) -> String {
        match &self.uplink {
            Some(uplink) => format!("{} over {uplink}", self.segment.summary()),
            None => self.segment.summary(),
        }
    }

    fn claim(&self) -> Claim {
        let mut claim = self.segment.claim(&self.name);
        claim.interfaces.extend(self.uplink.clone());
        claim
    }

    fn parts(&self, view: &HostView) -> Result<Vec<Part>, NetError> {
        let bridge = self.segment.bridge(&self.name)?;
        let mut parts = self.segment.bridge_parts(&self.name, true)?;
        if let Some(uplink) = &self.uplink {
            let seen = free_uplink(&self.name, view, uplink, bridge)?;
            let (name, bridge) = (uplink.clone(), bridge.clone());
            parts.push(Part::Enslaved(Enslaved {
                name: name.clone(),
                bridge: bridge.clone(),
                was_up: seen.up,
            }));
            parts.push(Part::BridgePort(BridgePort {
                name,
                bridge,
                isolated: false,
                vlan: None,
                trunk: vec![ALL],
            }));
        }
        Ok(parts)
    }

    fn port(&self, port: &IfName, request: &PortRequest) -> Result<Vec<Part>, NetError> {
        if request.vlan.is_none() && request.trunk.is_empty() {
            return Err(refused(
                &self.name,
                "a port of it is in a VLAN: name one with --vlan, or several with --trunk",
            ));
        }
        let ends = request.trunk.iter().flat_map(|(first, last)| [*first, *last]);
        for id in request.vlan.into_iter().chain(ends) {
            check_vlan(&self.name, id)?;
        }
        self.segment.port(&self.name, port, request)
    }
}
