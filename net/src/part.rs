//! The parts that a started network consists of: each can be looked at, made, and taken away again.
//!
//! A plan is a list of parts, in the order in which they are made. Making one that is there mends it; taking away one
//! that is gone is no error. So whoever finds a plan that was begun, after a crash or later, can finish it or undo it
//! by looking at what there is.

use std::fmt;
use std::path::PathBuf;

use host::watch::Watch;
use ipnet::IpNet;
use model::Name;
use serde::{Deserialize, Serialize};

use crate::bridge_port::BridgePort;
use crate::dnsmasq::Dnsmasq;
use crate::link::{Enslaved, Link, LinkForm};
use crate::netlink::Netlink;
use crate::nft::Table;
use crate::port::Tap;
use crate::rates::Rates;
use crate::sysctl::Forwarding;
use crate::{IfName, NetError};

/// One part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "part", rename_all = "kebab-case")]
pub enum Part {
    /// Rules of nftables.
    Table(Table),
    /// An interface.
    Link(Link),
    /// Somebody else's interface in a bridge of ours.
    Enslaved(Enslaved),
    /// An address of an interface of ours.
    Address {
        /// The interface.
        link: IfName,
        /// The address, with the length of its prefix.
        address: IpNet,
    },
    /// Forwarding between interfaces.
    Forwarding(Forwarding),
    /// DHCP and DNS.
    Dnsmasq(Dnsmasq),
    /// The host's end of a NIC.
    Tap(Tap),
    /// What an interface may do as a port of its bridge.
    BridgePort(BridgePort),
    /// How much a port may receive and send.
    Rates(Rates),
}

/// How a part was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// As it was made.
    There,
    /// Not at all.
    Missing,
    /// Otherwise than it was made.
    Differs(String),
}

/// A part that was made, with the fingerprint of what the kernel showed then, where that tells more than the part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Made {
    /// The part.
    #[serde(flatten)]
    pub part: Part,
    /// The fingerprint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub print: Option<String>,
}

/// Where networks keep things.
#[derive(Clone, Debug)]
pub struct Places {
    /// What a reboot may take away, as it takes the networks away.
    pub run: PathBuf,
    /// What outlives a reboot: leases.
    pub state: PathBuf,
}

/// The host that parts are made on.
#[derive(Debug)]
pub struct Host {
    /// The kernel.
    pub netlink: Netlink,
    /// Files.
    pub places: Places,
    /// Whether a signal asks to end: between two parts that is heard, and what was made is taken away.
    pub watch: Watch,
}

impl Places {
    /// The files of one network that are gone when it is stopped.
    pub fn of(&self, network: &Name) -> PathBuf {
        self.run.join(format!("{network}.d"))
    }

    /// The record of one started network.
    pub fn record(&self, network: &Name) -> PathBuf {
        self.run.join(format!("{network}.json"))
    }

    /// The leases of one network.
    pub fn leases(&self, network: &Name) -> PathBuf {
        self.state.join(format!("{network}.leases"))
    }

    /// What was changed of the host's own settings, and what it was.
    pub fn ledger(&self) -> PathBuf {
        self.run.join("forwarding.ledger")
    }
}

impl Part {
    /// Looks at it.
    ///
    /// # Errors
    /// [`NetError`] if nothing can be seen.
    pub async fn observe(&self, host: &Host, print: Option<&str>) -> Result<Seen, NetError> {
        match self {
            Self::Table(table) => table.observe(print),
            Self::Link(link) => link.observe(&host.netlink).await,
            Self::Enslaved(enslaved) => enslaved.observe(&host.netlink).await,
            Self::Address { link, address } => {
                let view = host.netlink.view().await?;
                let Some(link) = view.link(link) else { return Ok(Seen::Missing) };
                let found = view.addresses_of(link.index).any(|held| held == *address);
                Ok(if found { Seen::There } else { Seen::Missing })
            }
            Self::Forwarding(forwarding) => forwarding.observe(),
            Self::Dnsmasq(dnsmasq) => dnsmasq.observe(&host.places),
            Self::Tap(tap) => tap.observe(&host.netlink).await,
            Self::BridgePort(port) => port.observe(&host.netlink).await,
            Self::Rates(rates) => rates.observe(),
        }
    }

    /// Makes it, or mends it. Returns the fingerprint for [`Part::observe`].
    ///
    /// # Errors
    /// [`NetError`]; then it may be there in part, and [`Part::unmake`] takes that away.
    pub async fn make(&self, host: &Host) -> Result<Option<String>, NetError> {
        match self {
            Self::Table(table) => return table.make().map(Some),
            Self::Link(link) => link.make(&host.netlink).await?,
            Self::Enslaved(enslaved) => enslaved.make(&host.netlink).await?,
            Self::Address { link, address } => {
                let link = host.netlink.expect(link).await?;
                host.netlink.add_address(&link, *address).await?;
            }
            Self::Forwarding(forwarding) => forwarding.make(&host.places.ledger())?,
            Self::Dnsmasq(dnsmasq) => dnsmasq.make(&host.places)?,
            Self::Tap(tap) => tap.make(&host.netlink).await?,
            Self::BridgePort(port) => port.make(&host.netlink).await?,
            Self::Rates(rates) => rates.make()?,
        }
        Ok(None)
    }

    /// The undo of [`Part::make`]. `begun` says that a command was killed before all parts were made.
    ///
    /// # Errors
    /// [`NetError`]; then it is still there.
    pub async fn unmake(&self, host: &Host, begun: bool) -> Result<(), NetError> {
        match self {
            Self::Table(table) => table.unmake(),
            Self::Link(link) => link.unmake(&host.netlink, begun).await,
            Self::Enslaved(enslaved) => enslaved.unmake(&host.netlink).await,
            // They go with the interface.
            Self::Address { .. } | Self::BridgePort(_) | Self::Rates(_) => Ok(()),
            Self::Forwarding(forwarding) => forwarding.unmake(&host.places.ledger()),
            Self::Dnsmasq(dnsmasq) => dnsmasq.unmake(&host.places),
            Self::Tap(tap) => tap.unmake(&host.netlink, begun).await,
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(table) => write!(f, "rules of nftables (table {} {})", table.family, table.name()),
            Self::Link(Link { name, form, .. }) => match form {
                LinkForm::Bridge { .. } => write!(f, "bridge {name}"),
                LinkForm::Vlan { lower, id } => write!(f, "VLAN {id} of {lower} as {name}"),
                LinkForm::Vxlan { vni, .. } => write!(f, "VXLAN {vni} as {name}"),
                LinkForm::Ifb => write!(f, "detour {name}"),
                LinkForm::Macvtap { lower, .. } => write!(f, "macvtap {name} on {lower}"),
            },
            Self::Enslaved(Enslaved { name, bridge, .. }) => write!(f, "{name} in bridge {bridge}"),
            Self::Address { link, address } => write!(f, "address {address} of {link}"),
            Self::Forwarding(Forwarding { bridge, uplinks, .. }) => {
                let uplinks: Vec<&str> = uplinks.iter().map(IfName::as_str).collect();
                match uplinks.as_slice() {
                    [] => write!(f, "forwarding for {bridge}"),
                    uplinks => write!(f, "forwarding between {bridge} and {}", uplinks.join(", ")),
                }
            }
            Self::Dnsmasq(_) => f.write_str("DHCP and DNS (dnsmasq)"),
            Self::Tap(tap) => write!(f, "tap {}", tap.name),
            Self::Rates(rates) => write!(f, "rates of {}", rates.name),
            Self::BridgePort(port) => write!(f, "{} as a port of {}", port.name, port.bridge),
        }
    }
}
