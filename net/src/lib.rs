//! Networks and their ports: what a NIC plugs into.
//!
//! Only the public types are here so far: the kinds of networks, and the address by which a NIC is named.

mod kind;
mod mac;

pub use kind::{NetworkKind, ParseNetworkKindError};
pub use mac::{MacAddress, ParseMacAddressError};
