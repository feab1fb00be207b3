//! An interface as a port of a bridge: whom it reaches, and in which VLANs.
//!
//! Source: linux/if_bridge.h, bridge(8).

use rtnetlink::packet_route::link::BridgeVlanInfoFlags;
use rtnetlink::{LinkBridgePort, LinkBridgeVlan};
use serde::{Deserialize, Serialize};

use crate::netlink::Netlink;
use crate::part::Seen;
use crate::{IfName, NetError};

/// A port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BridgePort {
    /// The interface.
    pub name: IfName,
    /// The bridge.
    pub bridge: IfName,
    /// Whether it reaches only ports that are not isolated.
    pub isolated: bool,
    /// The VLAN of what comes untagged; frames of it leave untagged.
    pub vlan: Option<u16>,
    /// VLANs that pass tagged, as ranges, both ends included.
    pub trunk: Vec<(u16, u16)>,
}

impl BridgePort {
    pub(crate) async fn observe(&self, netlink: &Netlink) -> Result<Seen, NetError> {
        let (port, bridge) = (netlink.link(&self.name).await?, netlink.link(&self.bridge).await?);
        let (Some(port), Some(bridge)) = (port, bridge) else { return Ok(Seen::Missing) };
        Ok(match port.controller == Some(bridge.index) {
            true if port.up => Seen::There,
            true => Seen::Differs(format!("{} is down", self.name)),
            false => Seen::Differs(format!("{} is not in {}", self.name, self.bridge)),
        })
    }

    /// Puts it into its bridge with what it may do there, and starts it last, so that no frame passes before.
    pub(crate) async fn make(&self, netlink: &Netlink) -> Result<(), NetError> {
        let (port, bridge) = (netlink.expect(&self.name).await?, netlink.expect(&self.bridge).await?);
        let what = format!("put {} into {}", self.name, self.bridge);
        netlink.set_link(&what, port.change().controller(bridge.index)).await?;
        if self.isolated {
            netlink.set_port(&what, LinkBridgePort::new(port.index).isolated(true)).await?;
        }
        if self.vlan.is_some() || !self.trunk.is_empty() {
            let mut vlans = LinkBridgeVlan::new(port.index);
            if let Some(vlan) = self.vlan {
                vlans = vlans.vlan(vlan, BridgeVlanInfoFlags::Pvid | BridgeVlanInfoFlags::Untagged);
            }
            for (first, last) in &self.trunk {
                vlans = match first == last {
                    true => vlans.vlan(*first, BridgeVlanInfoFlags::empty()),
                    false => vlans
                        .vlan_range_start(*first, BridgeVlanInfoFlags::empty())
                        .vlan_range_end(*last, BridgeVlanInfoFlags::empty()),
                };
            }
            netlink.set_vlans(format!("set the VLANs of {}", self.name), vlans.build()).await?;
        }
        netlink.set_link(format!("start {}", self.name), port.change().up()).await
    }
}
