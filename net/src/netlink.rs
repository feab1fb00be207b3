//! What the kernel is asked and told about interfaces, addresses and routes.
//!
//! Source: rtnetlink(7), linux/rtnetlink.h, linux/if_link.h.

use std::fmt;
use std::net::IpAddr;

use futures_util::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use rtnetlink::packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{InfoData, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::NeighbourFlags;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::{LinkBridgePort, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder};
use rustix::io::Errno;
use tokio::task::JoinHandle;

use crate::{IfName, MacAddress, NetError};

/// A socket to the kernel's routing. Its task ends with it.
pub struct Netlink {
    handle: rtnetlink::Handle,
    task: JoinHandle<()>,
}

/// An interface as the kernel shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkSeen {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is, for example `bridge`; none for hardware.
    pub kind: Option<String>,
    /// The text that says whose it is.
    pub alias: Option<String>,
    /// Its address.
    pub mac: Vec<u8>,
    /// Its MTU.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// Whether something is plugged in.
    pub carrier: bool,
    /// The bridge or bond that it is a port of.
    pub controller: Option<u32>,
    /// The interface below it.
    pub lower: Option<u32>,
    /// What its kind has beside.
    pub data: Option<InfoData>,
}

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressSeen {
    /// The interface's number.
    pub link: u32,
    /// The address, with the length of its prefix.
    pub address: IpNet,
}

/// A route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteSeen {
    /// Where to; none for the default route.
    pub to: Option<IpNet>,
    /// Whether it is for IPv6.
    pub v6: bool,
    /// The interface's number.
    pub link: u32,
}

/// The host's interfaces, addresses and routes at one moment.
#[derive(Clone, Debug, Default)]
pub struct HostView {
    /// Interfaces.
    pub links: Vec<LinkSeen>,
    /// Addresses.
    pub addresses: Vec<AddressSeen>,
    /// Unicast routes of every table.
    pub routes: Vec<RouteSeen>,
}

impl Netlink {
    /// Opens the socket, in the network namespace of this thread.
    ///
    /// # Errors
    /// [`NetError::Netlink`].
    pub fn open() -> Result<Self, NetError> {
        let opened = rtnetlink::new_connection();
        let (connection, handle, _) = opened.map_err(|fault| NetError::Netlink {
            what: "open a netlink socket".into(),
            fault: fault.to_string(),
        })?;
        Ok(Self { handle, task: tokio::spawn(connection) })
    }

    /// Everything that plans are made of.
    ///
    /// # Errors
    /// [`NetError::Netlink`].
    pub async fn view(&self) -> Result<HostView, NetError> {
        let links = self.handle.link().get().execute().try_collect::<Vec<_>>().await;
        let links = links.map_err(failed("list interfaces"))?.iter().map(link_seen).collect();
        let addresses = self.handle.address().get().execute().try_collect::<Vec<_>>().await;
        let addresses =
            addresses.map_err(failed("list addresses"))?.iter().filter_map(address_seen).collect();
        let mut routes = Vec::new();
        let v4 = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
        let v6 = RouteMessageBuilder::<std::net::Ipv6Addr>::new().build();
        for family in [v4, v6] {
            let some = self.handle.route().get(family).execute().try_collect::<Vec<_>>().await;
            routes.extend(some.map_err(failed("list routes"))?.iter().filter_map(route_seen));
        }
        Ok(HostView { links, addresses, routes })
    }

    /// One interface; none if there is none of that name.
    ///
    /// # Errors
    /// [`NetError::Netlink`].
    pub async fn link(&self, name: &IfName) -> Result<Option<LinkSeen>, NetError> {
        let found = self.handle.link().get().match_name(name.as_str()).execute().try_next().await;
        match found {
            Ok(found) => Ok(found.as_ref().map(link_seen)),
            Err(fault) if errno(&fault) == Some(Errno::NODEV) => Ok(None),
            Err(fault) => Err(failed(format!("look for interface {name}"))(fault)),
        }
    }

    /// An interface that has to be there.
    ///
    /// # Errors
    /// [`NetError::NoInterface`]; [`NetError::Netlink`].
    pub async fn expect(&self, name: &IfName) -> Result<LinkSeen, NetError> {
        self.link(name).await?.ok_or_else(|| NetError::NoInterface { name: name.clone() })
    }

    /// Makes an interface.
    ///
    /// # Errors
    /// [`NetError::Netlink`].
    pub async fn add_link(&self, name: &IfName, message: LinkMessage) -> Result<(), NetError> {
        let made = self.handle.link().add(message).execute().await;
        made.map_err(failed(format!("make interface {name}")))
    }

    /// Changes an interface that is there.
    ///
    /// # Errors
    /// [`NetError::Netlink`].
    pub async fn set_link(
        &self,
        what: impl fmt::Display,
        message: LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), NetError> {
        self.handle.link().set(message.build()).execute().await.map_err(failed(what))
    }

    /// Changes what an interface does as a port of its bridge.
    ///
    /// # Errors
    /// [`NetError::Netlink`].
    pub async fn set_port(
        &self,
        what: impl fmt::Display,
        message: LinkMessageBuilder<LinkBridgePort>,
    ) -> Result<(), NetError> {
        self.handle.link().set_port(message.build()).execute().await.map_err(failed(what))
    }

    /// Changes the VLANs of a bridge or of a port of one.
    ///
    /// # Errors
    /// [`NetError::Netlink`].
    pub async fn set_vlans(&self, what: impl fmt::Display, message: LinkMessage) -> Result<(), NetError> {
        self.handle.link().set(message).execute().await.map_err(failed(what))
    }

    /// Removes an interface. One that is gone is no error.
    ///
    /// # Errors
    /// [`NetError::Netlink`].
    pub async fn remove_link(&self, link: &LinkSeen) -> Result<(), NetError> {
        match self.handle.link().del(link.index).execute().await {
            Err(fault) if errno(&fault) == Some(Errno::NODEV) => Ok(()),
            done => done.map_err(failed(format!("remove interface {}", link.name))),
        }
    }

    /// Gives an interface an address. One that it has is no error.
    ///
    /// The kernel does not look for duplicates of an IPv6 address first: on a bridge that has no port yet that would
    /// last as long as it has none.
    ///
    /// # Errors
    /// [`NetError::Netlink`].
    pub async fn add_address(&self, link: &LinkSeen, address: IpNet) -> Result<(), NetError> {
        let mut request = self.handle.address().add(link.index, address.addr(), address.prefix_len());
        if address.addr().is_ipv6() {
            let message = request.message_mut();
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        match request.execute().await {
            Err(fault) if errno(&fault) == Some(Errno::EXIST) => Ok(()),
            done => done.map_err(failed(format!("give {} the address {address}", link.name))),
        }
    }

    /// Lets frames for addresses that a VXLAN interface does not know go to `peer`.
    ///
    /// # Errors
    /// [`NetError::Netlink`].
    pub async fn add_flood(&self, link: &LinkSeen, peer: IpAddr) -> Result<(), NetError> {
        const ALL: [u8; 6] = [0; 6];
        let add = self.handle.neighbours().add_bridge(link.index, &ALL).destination(peer);
        // The interface's own table: without that word it would be that of its bridge.
        let mut request = add.flags(NeighbourFlags::Own);
        let message = RouteNetlinkMessage::NewNeighbour(request.message_mut().clone());
        let mut request = NetlinkMessage::from(message);
        // The crate knows to add and to replace only, and here one key has several destinations.
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
        let what = format!("add the peer {peer} to {}", link.name);
        let mut answers = self.handle.clone().request(request).map_err(failed(&what))?;
        while let Some(answer) = answers.next().await {
            let NetlinkPayload::Error(fault) = answer.payload else { continue };
            let fault = rtnetlink::Error::NetlinkError(fault);
            if !matches!(errno(&fault), None | Some(Errno::EXIST)) {
                return Err(failed(&what)(fault));
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Netlink")
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl LinkSeen {
    /// A request to change it.
    pub fn change(&self) -> LinkMessageBuilder<LinkUnspec> {
        LinkUnspec::new_with_index(self.index)
    }
}

impl HostView {
    /// The interface of this name.
    pub fn link(&self, name: &IfName) -> Option<&LinkSeen> {
        self.links.iter().find(|link| link.name == name.as_str())
    }

    /// The ports of a bridge.
    pub fn ports(&self, bridge: u32) -> impl Iterator<Item = &LinkSeen> {
        self.links.iter().filter(move |link| link.controller == Some(bridge))
    }

    /// The addresses of an interface.
    pub fn addresses_of(&self, link: u32) -> impl Iterator<Item = IpNet> {
        self.addresses.iter().filter(move |seen| seen.link == link).map(|seen| seen.address)
    }

    /// Who uses `subnet` or a part of it, in words; interfaces of the names in `own` do not count.
    pub fn user_of(&self, subnet: &IpNet, own: &[&IfName]) -> Option<String> {
        let counts = |index: u32| {
            let link = self.links.iter().find(|link| link.index == index)?;
            own.iter().all(|own| own.as_str() != link.name).then_some(link.name.as_str())
        };
        let held = self.addresses.iter().filter(|seen| overlap(&seen.address, subnet));
        let address = held
            .filter_map(|seen| Some(format!("the address {} of {}", seen.address, counts(seen.link)?)))
            .next();
        let routed = || {
            let routes = self.routes.iter().filter_map(|route| Some((route.to?, route.link)));
            let mut hits = routes.filter(|(to, _)| to.prefix_len() > 0 && overlap(to, subnet));
            hits.find_map(|(to, link)| Some(format!("the route to {to} over {}", counts(link)?)))
        };
        address.or_else(routed)
    }

    /// The interfaces over which a default route leads.
    pub fn default_links(&self, v6: bool) -> Vec<IfName> {
        let defaults = self.routes.iter().filter(|route| route.to.is_none() && route.v6 == v6);
        let links = defaults.filter_map(|route| self.links.iter().find(|link| link.index == route.link));
        let mut names: Vec<IfName> = links.filter_map(|link| link.name.parse().ok()).collect();
        names.sort();
        names.dedup();
        names
    }

    /// Whether a NIC has this address already.
    pub fn has_mac(&self, mac: MacAddress) -> bool {
        self.links.iter().any(|link| link.mac == mac.bytes())
    }
}

/// Whether two subnets have an address in common.
pub(crate) fn overlap(a: &IpNet, b: &IpNet) -> bool {
    let (a, b) = (a.trunc(), b.trunc());
    a.contains(&b) || b.contains(&a)
}

fn link_seen(message: &LinkMessage) -> LinkSeen {
    let mut seen = LinkSeen {
        index: message.header.index,
        name: String::new(),
        kind: None,
        alias: None,
        mac: Vec::new(),
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        carrier: message.header.flags.contains(LinkFlags::LowerUp),
        controller: None,
        lower: None,
        data: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => seen.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => seen.alias = Some(alias.clone()),
            LinkAttribute::Address(mac) => seen.mac.clone_from(mac),
            LinkAttribute::Mtu(mtu) => seen.mtu = *mtu,
            LinkAttribute::Controller(index) => seen.controller = Some(*index).filter(|index| *index != 0),
            LinkAttribute::Link(index) => seen.lower = Some(*index).filter(|index| *index != 0),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => seen.kind = Some(kind.to_string()),
                        LinkInfo::Data(data) => seen.data = Some(data.clone()),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    seen
}

fn address_seen(message: &AddressMessage) -> Option<AddressSeen> {
    // On a point-to-point link the local address is the own one, and the other one the peer's.
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let any = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    let address = IpNet::new(local.or(any)?, message.header.prefix_len).ok()?;
    Some(AddressSeen { link: message.header.index, address })
}

fn route_seen(message: &RouteMessage) -> Option<RouteSeen> {
    if message.header.kind != RouteType::Unicast {
        return None;
    }
    let mut to = None;
    let mut link = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => to = Some(IpAddr::V4(*address)),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => to = Some(IpAddr::V6(*address)),
            RouteAttribute::Oif(index) => link = Some(*index),
            _ => {}
        }
    }
    let v6 = message.header.address_family == rtnetlink::packet_route::AddressFamily::Inet6;
    let length = message.header.destination_prefix_length;
    let to = to.and_then(|address| IpNet::new(address, length).ok());
    Some(RouteSeen { to, v6, link: link? })
}

fn errno(fault: &rtnetlink::Error) -> Option<Errno> {
    match fault {
        rtnetlink::Error::NetlinkError(ErrorMessage { code: Some(code), .. }) => {
            Some(Errno::from_raw_os_error(code.get().saturating_neg()))
        }
        _ => None,
    }
}

/// An error that says what was tried.
fn failed(what: impl fmt::Display) -> impl FnOnce(rtnetlink::Error) -> NetError {
    move |fault| match errno(&fault) {
        Some(Errno::PERM | Errno::ACCESS) => NetError::NoPrivilege { what: what.to_string() },
        Some(errno) => {
            let fault = std::io::Error::from(errno).to_string();
            NetError::Netlink { what: what.to_string(), fault }
        }
        None => NetError::Netlink { what: what.to_string(), fault: fault.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> HostView {
        let link = |index, name: &str| LinkSeen {
            index,
            name: name.into(),
            kind: None,
            alias: None,
            mac: vec![0x52, 0x54, 0, 0, 0, index as u8],
            mtu: 1500,
            up: true,
            carrier: true,
            controller: None,
            lower: None,
            data: None,
        };
        HostView {
            links: vec![link(1, "lo"), link(2, "eth0"), link(3, "eth1")],
            addresses: vec![AddressSeen { link: 2, address: "192.0.2.7/24".parse().unwrap() }],
            routes: vec![
                RouteSeen { to: None, v6: false, link: 2 },
                RouteSeen { to: Some("198.51.100.0/24".parse().unwrap()), v6: false, link: 3 },
            ],
        }
    }

    #[test]
    fn a_subnet_that_the_host_uses_is_told_with_its_user() {
        let view = view();
        let user = |text: &str| view.user_of(&text.parse().unwrap(), &[]);
        assert!(user("192.0.2.0/25").unwrap().contains("192.0.2.7/24 of eth0"));
        assert!(user("198.51.0.0/16").unwrap().contains("route to 198.51.100.0/24 over eth1"));
        assert_eq!(user("203.0.113.0/24"), None, "the default route holds no subnet");
        let own = "eth0".parse().unwrap();
        assert_eq!(view.user_of(&"192.0.2.0/25".parse().unwrap(), &[&own]), None);
    }

    #[test]
    fn default_routes_and_addresses_are_found() {
        let view = view();
        assert_eq!(view.default_links(false), ["eth0".parse().unwrap()]);
        assert!(view.default_links(true).is_empty());
        assert!(view.has_mac("52:54:00:00:00:02".parse().unwrap()));
        assert!(!view.has_mac("52:54:00:00:00:09".parse().unwrap()));
    }
}
