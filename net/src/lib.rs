//! Networks and their ports: what a NIC plugs into.
//!
//! - [`network`]: the kinds, each in a file of its own, which decide
//! - [`part`]: what they are made of: interfaces, rules, forwarding, DHCP and DNS
//! - [`lifecycle`]: starting, stopping and plugging, which is the same for every kind
//! - [`netlink`]: what the kernel is asked and told

mod bridge_port;
mod dnsmasq;
mod error;
mod filter;
mod ifname;
pub mod lifecycle;
mod link;
mod mac;
pub mod netlink;
pub mod network;
mod nft;
pub mod part;
mod port;
mod rates;
mod sysctl;
pub mod tap;

pub use dnsmasq::{Lease, leases};
pub use error::NetError;
pub use ifname::{IFNAME_MAX, IfName, ParseIfNameError};
pub use mac::{MacAddress, ParseMacAddressError};
pub use netlink::{HostView, LinkSeen};
pub use port::PortRequest;
pub use rates::{ParseRateError, Rate};
