//! The kinds of networks.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What a network is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkKind {
    /// A bridge that leads nowhere: its VMs reach each other and the host.
    Isolated,
    /// A bridge whose VMs reach the outside through the host's address.
    Nat,
    /// A bridge whose subnet the host routes.
    Routed,
    /// A bridge over an interface of the host.
    Bridge,
    /// Each NIC is a macvtap on an interface of the host.
    Macvtap,
    /// Ports of an Open vSwitch bridge.
    Ovs,
    /// A bridge that spans hosts through a VXLAN tunnel.
    Vxlan,
    /// A bridge that filters VLANs, with a tag or a trunk for each port.
    Vlan,
    /// A pool of devices that are passed through.
    Hostdev,
}

/// The text names no kind of network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no kind of network (isolated, nat, routed, bridge, macvtap, ovs, vxlan, vlan, hostdev)")]
pub struct ParseNetworkKindError(pub String);

impl NetworkKind {
    /// Every kind.
    pub const ALL: [Self; 9] = [
        Self::Isolated,
        Self::Nat,
        Self::Routed,
        Self::Bridge,
        Self::Macvtap,
        Self::Ovs,
        Self::Vxlan,
        Self::Vlan,
        Self::Hostdev,
    ];

    /// The word for it in definitions and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Isolated => "isolated",
            Self::Nat => "nat",
            Self::Routed => "routed",
            Self::Bridge => "bridge",
            Self::Macvtap => "macvtap",
            Self::Ovs => "ovs",
            Self::Vxlan => "vxlan",
            Self::Vlan => "vlan",
            Self::Hostdev => "hostdev",
        }
    }
}

impl FromStr for NetworkKind {
    type Err = ParseNetworkKindError;

    fn from_str(text: &str) -> Result<Self, ParseNetworkKindError> {
        let found = Self::ALL.into_iter().find(|kind| kind.as_str() == text);
        found.ok_or_else(|| ParseNetworkKindError(text.to_owned()))
    }
}

impl fmt::Display for NetworkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_read_by_its_word() {
        for kind in NetworkKind::ALL {
            assert_eq!(kind.as_str().parse(), Ok(kind));
        }
        assert_eq!("NAT".parse::<NetworkKind>(), Err(ParseNetworkKindError("NAT".into())));
    }
}
