//! Interfaces that snapctl makes, and interfaces of others that it puts into a bridge of its own.

use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use host::Error as HostError;
use model::Name;
use rtnetlink::packet_route::link::{BridgeStpState, InfoVxlan, LinkMessage, MacVtapMode};
use rtnetlink::{LinkBridge, LinkIfb, LinkMacVtap, LinkMessageBuilder, LinkVlan, LinkVxlan};
use serde::{Deserialize, Serialize};

use crate::netlink::{LinkSeen, Netlink};
use crate::part::Seen;
use crate::{HostView, IfName, MacAddress, NetError};

/// An interface of a network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// Its name.
    pub name: IfName,
    /// The network that it belongs to.
    pub network: Name,
    /// What it is.
    pub form: LinkForm,
    /// Its address; the kernel chooses one where there is none.
    pub mac: Option<MacAddress>,
    /// Its MTU; the kernel's choice where there is none.
    pub mtu: Option<u32>,
    /// The bridge that it is a port of.
    pub bridge: Option<IfName>,
    /// Whether the host speaks IPv6 on it.
    pub ipv6: bool,
}

/// What kind of interface it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum LinkForm {
    /// A bridge.
    Bridge {
        /// Whether it speaks the spanning tree protocol.
        stp: bool,
        /// Whether it keeps VLANs apart.
        vlan_filtering: bool,
    },
    /// A VLAN of another interface (802.1Q).
    Vlan {
        /// That interface.
        lower: IfName,
        /// 1 to 4094.
        id: u16,
    },
    /// A tunnel to other hosts (RFC 7348).
    Vxlan {
        /// The network identifier, 24 bits.
        vni: u32,
        /// The own address of the tunnel.
        local: Option<IpAddr>,
        /// The other hosts.
        peers: Vec<IpAddr>,
        /// The group where the others are found instead.
        group: Option<IpAddr>,
        /// The interface below.
        lower: Option<IfName>,
        /// The UDP port.
        port: u16,
    },
    /// What a guest sends is led through it (an intermediate functional block).
    Ifb,
    /// A guest's NIC on an interface of the host.
    Macvtap {
        /// That interface.
        lower: IfName,
        /// Whom it reaches.
        mode: MacvtapMode,
        /// The user who may open its device beside root.
        owner: Option<u32>,
    },
}

/// Whom a macvtap reaches beside what is behind the interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MacvtapMode {
    /// The others on the same interface.
    #[default]
    Bridge,
    /// The others, by way of the switch outside.
    Vepa,
    /// None of the others.
    Private,
    /// There are no others: the guest has the interface for itself.
    Passthru,
}

/// An interface of somebody else's that is put into a bridge of snapctl's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Enslaved {
    /// The interface.
    pub name: IfName,
    /// The bridge.
    pub bridge: IfName,
    /// Whether it was up before; if not, it is taken down again.
    pub was_up: bool,
}

/// The alias of what belongs to a network (`ip link` shows it).
pub(crate) fn alias(network: &Name) -> String {
    format!("snapctl:{network}")
}

/// Whose an interface is that has the name of one of ours.
///
/// One without an alias is ours if `begun`: a command was killed between its making and its marking, and before it
/// nobody had that name.
pub(crate) fn refuse_foreign(seen: &LinkSeen, network: &Name, begun: bool) -> Result<(), NetError> {
    let why = match &seen.alias {
        Some(whose) if *whose == alias(network) => return Ok(()),
        None if begun => return Ok(()),
        Some(whose) => match whose.strip_prefix("snapctl:") {
            Some(other) => format!("belongs to network {other}"),
            None => "is not snapctl's".to_owned(),
        },
        None => "is not snapctl's".to_owned(),
    };
    let name = seen.name.parse().map_err(|_| NetError::Netlink {
        what: format!("use interface {}", seen.name),
        fault: "its name cannot be used in rules".into(),
    })?;
    Err(NetError::InterfaceTaken { name, why })
}

impl LinkForm {
    /// The kernel's word for it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Bridge { .. } => "bridge",
            Self::Vlan { .. } => "vlan",
            Self::Vxlan { .. } => "vxlan",
            Self::Ifb => "ifb",
            Self::Macvtap { .. } => "macvtap",
        }
    }
}

impl MacvtapMode {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Vepa => "vepa",
            Self::Private => "private",
            Self::Passthru => "passthru",
        }
    }

    fn of_kernel(self) -> MacVtapMode {
        match self {
            Self::Bridge => MacVtapMode::Bridge,
            Self::Vepa => MacVtapMode::Vepa,
            Self::Private => MacVtapMode::Private,
            Self::Passthru => MacVtapMode::Passthrough,
        }
    }
}

impl Link {
    pub(crate) async fn observe(&self, netlink: &Netlink) -> Result<Seen, NetError> {
        let Some(seen) = netlink.link(&self.name).await? else { return Ok(Seen::Missing) };
        if let Err(fault) = refuse_foreign(&seen, &self.network, false) {
            return Ok(Seen::Differs(fault.to_string()));
        }
        let bridge = match &self.bridge {
            Some(bridge) => netlink.link(bridge).await?.map(|bridge| bridge.index),
            None => seen.controller,
        };
        Ok(match () {
            () if seen.kind.as_deref() != Some(self.form.kind()) => {
                Seen::Differs(format!("{} is no {}", self.name, self.form.kind()))
            }
            () if !seen.up => Seen::Differs(format!("{} is down", self.name)),
            () if self.mtu.is_some_and(|mtu| mtu != seen.mtu) => {
                Seen::Differs(format!("{} has the MTU {}", self.name, seen.mtu))
            }
            () if bridge != seen.controller => Seen::Differs(format!("{} is not in its bridge", self.name)),
            () => Seen::There,
        })
    }

    /// Makes it, marks it, and starts it; mends it where it is there.
    pub(crate) async fn make(&self, netlink: &Netlink) -> Result<(), NetError> {
        let seen = match netlink.link(&self.name).await? {
            Some(seen) => {
                refuse_foreign(&seen, &self.network, false)?;
                seen
            }
            None => {
                netlink.add_link(&self.name, self.message(netlink).await?).await?;
                netlink.expect(&self.name).await?
            }
        };
        hush(&self.name, self.ipv6)?;
        if let LinkForm::Macvtap { owner: Some(owner), .. } = self.form {
            give_device(&self.name, seen.index, owner)?;
        }
        let mut change = seen.change().alias(alias(&self.network));
        if let Some(bridge) = &self.bridge {
            change = change.controller(netlink.expect(bridge).await?.index);
        }
        if let Some(mtu) = self.mtu {
            change = change.mtu(mtu);
        }
        netlink.set_link(format!("start interface {}", self.name), change.up()).await?;
        if let LinkForm::Vxlan { peers, .. } = &self.form {
            for peer in peers {
                netlink.add_flood(&seen, *peer).await?;
            }
        }
        Ok(())
    }

    /// The undo of [`Link::make`].
    pub(crate) async fn unmake(&self, netlink: &Netlink, begun: bool) -> Result<(), NetError> {
        let Some(seen) = netlink.link(&self.name).await? else { return Ok(()) };
        refuse_foreign(&seen, &self.network, begun)?;
        if matches!(self.form, LinkForm::Bridge { .. }) {
            refuse_guests(&netlink.view().await?, &seen, &self.network, |_| false)?;
        }
        netlink.remove_link(&seen).await
    }

    async fn message(&self, netlink: &Netlink) -> Result<LinkMessage, NetError> {
        let name = self.name.as_str();
        Ok(match &self.form {
            LinkForm::Bridge { stp, vlan_filtering } => {
                let state = if *stp { BridgeStpState::KernelStp } else { BridgeStpState::Disabled };
                let mut bridge = LinkMessageBuilder::<LinkBridge>::new(name).stp_state(state);
                if !stp {
                    // Ports forward at once: no loop is looked for.
                    bridge = bridge.forward_delay(0);
                }
                if *vlan_filtering {
                    bridge = bridge.vlan_filtering(true).vlan_default_pvid(0);
                }
                self.dressed(bridge).build()
            }
            LinkForm::Vlan { lower, id } => {
                let lower = netlink.expect(lower).await?.index;
                let vlan = LinkMessageBuilder::<LinkVlan>::new(name).id(*id);
                self.dressed(vlan).link(lower).build()
            }
            LinkForm::Vxlan { vni, local, group, lower, port, .. } => {
                let mut vxlan = LinkMessageBuilder::<LinkVxlan>::new(name).id(*vni).port(*port);
                vxlan = match local {
                    Some(IpAddr::V4(local)) => vxlan.local(*local),
                    Some(IpAddr::V6(local)) => vxlan.local6(*local),
                    None => vxlan,
                };
                vxlan = match group {
                    Some(IpAddr::V4(group)) => vxlan.group(*group),
                    Some(IpAddr::V6(group)) => vxlan.group6(*group),
                    None => vxlan,
                };
                if let Some(lower) = lower {
                    let index = netlink.expect(lower).await?.index;
                    vxlan = vxlan.append_info_data(InfoVxlan::Link(index));
                }
                self.dressed(vxlan).build()
            }
            LinkForm::Ifb => self.dressed(LinkMessageBuilder::<LinkIfb>::new(name)).build(),
            LinkForm::Macvtap { lower, mode, .. } => {
                let lower = netlink.expect(lower).await?.index;
                let macvtap = LinkMessageBuilder::<LinkMacVtap>::new(name).mode(mode.of_kernel());
                self.dressed(macvtap).link(lower).build()
            }
        })
    }

    /// What every interface can have from its beginning.
    fn dressed<T>(&self, mut builder: LinkMessageBuilder<T>) -> LinkMessageBuilder<T> {
        if let Some(mac) = self.mac {
            builder = builder.address(mac.bytes().to_vec());
        }
        if let Some(mtu) = self.mtu {
            builder = builder.mtu(mtu);
        }
        builder
    }
}

/// Keeps the host's own IPv6 off an interface, or at least what others would configure on it; before it is started.
pub(crate) fn hush(name: &IfName, ipv6: bool) -> Result<(), HostError> {
    let (key, value) = if ipv6 { ("accept_ra", "0") } else { ("disable_ipv6", "1") };
    let file = PathBuf::from(format!("/proc/sys/net/ipv6/conf/{name}/{key}"));
    match fs::write(&file, value) {
        // A kernel without IPv6.
        Err(fault) if fault.kind() == ErrorKind::NotFound => Ok(()),
        done => done.map_err(HostError::io("write", &file)),
    }
}

/// Lets a user open the device of a macvtap.
fn give_device(name: &IfName, index: u32, owner: u32) -> Result<(), NetError> {
    let device = PathBuf::from(format!("/dev/tap{index}"));
    // Interfaces of other network namespaces can have the same number, and the same device's name.
    let number = fs::read_to_string(format!("/sys/class/net/{name}/tap{index}/dev")).unwrap_or_default();
    let found = fs::metadata(&device).map_err(HostError::io("look at", &device))?;
    let (major, minor) = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
    if number.trim() != format!("{major}:{minor}") {
        let fault =
            format!("{} is another one; that of {name} has the number {}", device.display(), number.trim());
        return Err(NetError::Netlink { what: format!("give away the device of {name}"), fault });
    }
    Ok(std::os::unix::fs::chown(&device, Some(owner), None).map_err(HostError::io("give away", &device))?)
}

/// Refuses to remove a bridge into which somebody else has put an interface; what `ours` knows does not count.
pub(crate) fn refuse_guests(
    view: &HostView,
    bridge: &LinkSeen,
    network: &Name,
    ours: impl Fn(&str) -> bool,
) -> Result<(), NetError> {
    let marked = |port: &LinkSeen| port.alias.as_deref().is_some_and(|whose| whose.starts_with("snapctl:"));
    let theirs = view.ports(bridge.index).filter(|port| !marked(port) && !ours(&port.name));
    let guests: Vec<&str> = theirs.map(|port| port.name.as_str()).collect();
    let Some(first) = guests.first() else { return Ok(()) };
    let why = format!(
        "its bridge {} has ports that are not snapctl's ({}); take them out of it first: ip link set {first} nomaster",
        bridge.name,
        guests.join(", ")
    );
    Err(NetError::Refused { network: network.clone(), why })
}

impl Enslaved {
    pub(crate) async fn observe(&self, netlink: &Netlink) -> Result<Seen, NetError> {
        let (port, bridge) = (netlink.link(&self.name).await?, netlink.link(&self.bridge).await?);
        let (Some(port), Some(bridge)) = (port, bridge) else { return Ok(Seen::Missing) };
        Ok(match port.controller == Some(bridge.index) {
            true if port.up => Seen::There,
            true => Seen::Differs(format!("{} is down", self.name)),
            false => Seen::Missing,
        })
    }

    pub(crate) async fn make(&self, netlink: &Netlink) -> Result<(), NetError> {
        let port = netlink.expect(&self.name).await?;
        let bridge = netlink.expect(&self.bridge).await?;
        if port.controller.is_some_and(|other| other != bridge.index) {
            let why = "is a port of another bridge or bond".into();
            return Err(NetError::InterfaceTaken { name: self.name.clone(), why });
        }
        let what = format!("put {} into {}", self.name, self.bridge);
        netlink.set_link(what, port.change().controller(bridge.index).up()).await
    }

    /// The undo of [`Enslaved::make`].
    pub(crate) async fn unmake(&self, netlink: &Netlink) -> Result<(), NetError> {
        let (port, bridge) = (netlink.link(&self.name).await?, netlink.link(&self.bridge).await?);
        let (Some(port), Some(bridge)) = (port, bridge) else { return Ok(()) };
        if port.controller != Some(bridge.index) {
            return Ok(());
        }
        let change = port.change().nocontroller();
        let change = if self.was_up { change } else { change.down() };
        netlink.set_link(format!("take {} out of {}", self.name, self.bridge), change).await
    }
}
