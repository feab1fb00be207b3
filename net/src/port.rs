//! Ports: one for each NIC of a guest that is plugged into a network.

use std::net::IpAddr;

use model::Name;
use serde::{Deserialize, Serialize};

use crate::link::{Link, LinkForm, refuse_foreign};
use crate::netlink::Netlink;
use crate::part::{Part, Seen};
use crate::rates::{Rate, Rates, detour};
use crate::{IfName, MacAddress, NetError, link, tap};

/// What a port is to be.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct PortRequest {
    /// The address of the guest's NIC, where it is known: what the port's rules hold it to.
    pub mac: Option<MacAddress>,
    /// The guest's own addresses; with them its rules hold it to those, beside what the network has fixed for it.
    pub address: Vec<IpAddr>,
    /// Whether there are no such rules.
    pub trust: bool,
    /// The VLAN of what the guest sends untagged.
    pub vlan: Option<u16>,
    /// VLANs that the guest may send tagged, as ranges, both ends included.
    pub trunk: Vec<(u16, u16)>,
    /// Whether it reaches only ports that are not isolated, and the host.
    pub isolated: bool,
    /// Whether QEMU may open it several times.
    pub multi_queue: bool,
    /// The user who may open it beside root, by number.
    pub owner: Option<u32>,
    /// The MTU; the network's where there is none.
    pub mtu: Option<u32>,
    /// How much the guest may receive.
    pub in_rate: Option<Rate>,
    /// How much it may send.
    pub out_rate: Option<Rate>,
}

/// A tap that stays while no QEMU has it open.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tap {
    /// Its name.
    pub name: IfName,
    /// The network that it is a port of.
    pub network: Name,
    /// Whether QEMU may open it several times.
    pub multi_queue: bool,
    /// The user who may open it beside root.
    pub owner: Option<u32>,
    /// The MTU.
    pub mtu: Option<u32>,
}

/// The rates of a port, and the detour that they need; before the port is started.
pub(crate) fn rates(network: &Name, port: &IfName, request: &PortRequest) -> Vec<Part> {
    if request.in_rate.is_none() && request.out_rate.is_none() {
        return Vec::new();
    }
    let outbound = request.out_rate.map(|rate| (rate, detour(port)));
    let link = outbound.as_ref().map(|(_, detour)| {
        Part::Link(Link {
            name: detour.clone(),
            network: network.clone(),
            form: LinkForm::Ifb,
            mac: None,
            mtu: None,
            bridge: None,
            ipv6: false,
        })
    });
    let rates = Part::Rates(Rates { name: port.clone(), inbound: request.in_rate, outbound });
    link.into_iter().chain([rates]).collect()
}

impl Tap {
    pub(crate) async fn observe(&self, netlink: &Netlink) -> Result<Seen, NetError> {
        let Some(seen) = netlink.link(&self.name).await? else { return Ok(Seen::Missing) };
        Ok(match refuse_foreign(&seen, &self.network, false) {
            Ok(()) => Seen::There,
            Err(fault) => Seen::Differs(fault.to_string()),
        })
    }

    pub(crate) async fn make(&self, netlink: &Netlink) -> Result<(), NetError> {
        match netlink.link(&self.name).await? {
            Some(seen) => refuse_foreign(&seen, &self.network, false)?,
            None => tap::make(&self.name, self.multi_queue, self.owner)?,
        }
        let seen = netlink.expect(&self.name).await?;
        link::hush(&self.name, false)?;
        let mut change = seen.change().alias(link::alias(&self.network));
        if let Some(mtu) = self.mtu {
            change = change.mtu(mtu);
        }
        netlink.set_link(format!("mark the tap {}", self.name), change).await
    }

    /// The undo of [`Tap::make`].
    pub(crate) async fn unmake(&self, netlink: &Netlink, begun: bool) -> Result<(), NetError> {
        let Some(seen) = netlink.link(&self.name).await? else { return Ok(()) };
        refuse_foreign(&seen, &self.network, begun)?;
        netlink.remove_link(&seen).await
    }
}
