//! `bridge`: guests are in the segment of an interface of the host, or of a bridge that the host has.

use model::Name;
use serde::{Deserialize, Serialize};

use super::segment::tap_in_bridge;
use super::{
    Claim, Kind, Network, Opened, Request, bad, check_vlan, free_uplink, options, refuse_vlans, refused,
    table,
};
use crate::link::{Enslaved, Link, LinkForm};
use crate::part::Part;
use crate::port::PortRequest;
use crate::{HostView, IfName, NetError};

pub(super) const KIND: Kind = Kind {
    name: "bridge",
    about: "guests are in the segment of an interface, VLAN or bond of the host (--uplink), or of a bridge that it has (--bridge)",
    options: &["bridge", "uplink", "vlan", "mtu", "stp"],
    segment: false,
    programs: &[],
    modules: &["bridge", "tun"],
    define,
    open,
};

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    /// The bridge: one that the host has, unless there is an uplink.
    #[serde(skip_serializing_if = "Option::is_none")]
    bridge: Option<IfName>,
    /// The interface over which a bridge is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    uplink: Option<IfName>,
    /// The VLAN of the uplink.
    #[serde(skip_serializing_if = "Option::is_none")]
    vlan: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    stp: bool,
}

#[derive(Debug)]
struct Bridge {
    name: Name,
    bridge: IfName,
    options: Options,
}

fn define(request: &Request<'_>) -> Result<toml::Table, NetError> {
    let name = request.network;
    let mut options: Options = options(&KIND, name, request.options.clone())?;
    match (&options.uplink, &options.bridge) {
        (Some(uplink), _) => {
            let bridge = options.bridge.get_or_insert_with(|| IfName::derived("sbr-", name.as_str()));
            if options.vlan.is_none() {
                free_uplink(name, request.view, uplink, bridge)?;
            }
        }
        (None, Some(bridge)) => require_bridge(bridge, request.view)?,
        (None, None) => {
            return Err(bad(
                name,
                "name an interface with --uplink, or a bridge that the host has with --bridge",
            ));
        }
    }
    table(name, &options)
}

fn open(name: &Name, table: toml::Table) -> Opened {
    let options: Options = options(&KIND, name, table)?;
    if let Some(vlan) = options.vlan {
        check_vlan(name, vlan)?;
        if options.uplink.is_none() {
            return Err(bad(name, "--vlan is that of an uplink: add --uplink"));
        }
    }
    let bridge = options.bridge.clone().ok_or_else(|| bad(name, "it names no bridge"))?;
    Ok(Box::new(Bridge { name: name.clone(), bridge, options }))
}

/// A bridge of the host's own that has to be there.
fn require_bridge(bridge: &IfName, view: &HostView) -> Result<(), NetError> {
    let link = view.link(bridge).ok_or_else(|| NetError::NoInterface { name: bridge.clone() })?;
    if link.kind.as_deref() == Some("bridge") {
        return Ok(());
    }
    let why = "is no bridge; name it with --uplink if one is to be made over it".to_owned();
    Err(NetError::InterfaceTaken { name: bridge.clone(), why })
}

impl Bridge {
    fn vlan_name(&self, uplink: &IfName, vlan: u16) -> IfName {
        let usual = format!("{uplink}.{vlan}");
        usual.parse().unwrap_or_else(|_| IfName::derived("svl-", &usual))
    }

    /// The interface in the bridge that leads out: a VLAN of our own, or the uplink itself.
    fn way_out(&self, uplink: &IfName, view: &HostView) -> Result<Part, NetError> {
        let Some(id) = self.options.vlan else {
            let seen = free_uplink(&self.name, view, uplink, &self.bridge)?;
            let (name, bridge) = (uplink.clone(), self.bridge.clone());
            return Ok(Part::Enslaved(Enslaved { name, bridge, was_up: seen.up }));
        };
        let seen = view.link(uplink).ok_or_else(|| NetError::NoInterface { name: uplink.clone() })?;
        if !seen.up {
            let why = format!(
                "{uplink} is down, and a VLAN of it would be: start it with 'ip link set {uplink} up'"
            );
            return Err(refused(&self.name, why));
        }
        Ok(Part::Link(Link {
            name: self.vlan_name(uplink, id),
            network: self.name.clone(),
            form: LinkForm::Vlan { lower: uplink.clone(), id },
            mac: None,
            mtu: self.options.mtu,
            bridge: Some(self.bridge.clone()),
            ipv6: false,
        }))
    }
}

impl Network for Bridge {
    fn kind(&self) -> &'static str {
        KIND.name
    }

    fn summary(&self) -> String {
        let bridge = &self.bridge;
        match (&self.options.uplink, self.options.vlan) {
            (Some(uplink), Some(vlan)) => format!("{bridge} over VLAN {vlan} of {uplink}"),
            (Some(uplink), None) => format!("{bridge} over {uplink}"),
            (None, _) => format!("the host's own {bridge}"),
        }
    }

    fn claim(&self) -> Claim {
        let mut interfaces = Vec::new();
        if let Some(uplink) = &self.options.uplink {
            interfaces.push(self.bridge.clone());
            // A VLAN leaves the interface below to others.
            interfaces
                .push(self.options.vlan.map_or_else(|| uplink.clone(), |id| self.vlan_name(uplink, id)));
        }
        Claim { network: self.name.clone(), subnets: Vec::new(), interfaces, macs: Vec::new() }
    }

    fn parts(&self, view: &HostView) -> Result<Vec<Part>, NetError> {
        let Some(uplink) = &self.options.uplink else {
            require_bridge(&self.bridge, view)?;
            return Ok(Vec::new());
        };
        let below = view.link(uplink).ok_or_else(|| NetError::NoInterface { name: uplink.clone() })?;
        let bridge = Part::Link(Link {
            name: self.bridge.clone(),
            network: self.name.clone(),
            form: LinkForm::Bridge { stp: self.options.stp, vlan_filtering: false },
            mac: None,
            // A bridge has the least MTU of its ports; the uplink's is what leads out.
            mtu: self.options.mtu.or(Some(below.mtu)),
            bridge: None,
            ipv6: false,
        });
        Ok(vec![bridge, self.way_out(uplink, view)?])
    }

    fn port(&self, port: &IfName, request: &PortRequest) -> Result<Vec<Part>, NetError> {
        refuse_vlans(&self.name, &KIND, request)?;
        Ok(tap_in_bridge(&self.name, &self.bridge, self.options.mtu, port, request))
    }
}
