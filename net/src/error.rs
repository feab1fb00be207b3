//! What can go wrong with a network or a port.

use std::path::PathBuf;

use host::Error as HostError;
use host::program::ProgramError;
use host::watch::Interrupted;
use ipnet::IpNet;
use model::Name;

use crate::{IfName, MacAddress};

/// A network or a port could not be used. Unless a variant says otherwise, nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A file could not be used.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A program failed, or is not there.
    #[error(transparent)]
    Program(ProgramError),
    /// A test asked for a failure.
    #[error(transparent)]
    Fault(#[from] host::fault::Fault),
    /// A signal asked to end.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
    /// The kernel refused.
    #[error("cannot {what}: {fault}")]
    Netlink {
        /// What was tried, as the rest of "cannot …".
        what: String,
        /// What the kernel said.
        fault: String,
    },
    /// It takes a privilege (`CAP_NET_ADMIN`) that this user has not.
    #[error("no permission to {what}")]
    NoPrivilege {
        /// What was tried.
        what: String,
    },
    /// No kind of network has this name.
    #[error("{text:?} is no kind of network")]
    NoSuchKind {
        /// The user's word.
        text: String,
    },
    /// The definition is wrong.
    #[error("network {network}: {fault}")]
    BadDefinition {
        /// The network.
        network: Name,
        /// What is wrong with it.
        fault: String,
    },
    /// Somebody uses the subnet.
    #[error("network {network} cannot have the subnet {subnet}: {user} is in it")]
    SubnetTaken {
        /// The network.
        network: Name,
        /// Its subnet.
        subnet: IpNet,
        /// Who uses it, in words.
        user: String,
    },
    /// There is no free subnet to choose.
    #[error("network {network}: every subnet of {within} is in use; choose one with --subnet")]
    NoFreeSubnet {
        /// The network.
        network: Name,
        /// Where one was looked for.
        within: IpNet,
    },
    /// There is no such interface.
    #[error("there is no interface {name}")]
    NoInterface {
        /// Its name.
        name: IfName,
    },
    /// The interface is there, and is not snapctl's, or not of this network.
    #[error("interface {name} is there, and {why}; it was left alone")]
    InterfaceTaken {
        /// Its name.
        name: IfName,
        /// Whose it is, or what it is.
        why: String,
    },
    /// It would be unsafe.
    #[error("network {network}: {why}")]
    Refused {
        /// The network.
        network: Name,
        /// What would happen.
        why: String,
    },
    /// The network is not started.
    #[error("network {network} is not started")]
    NotStarted {
        /// The network.
        network: Name,
    },
    /// The network has no such port.
    #[error("network {network} has no port {port}")]
    NoSuchPort {
        /// The network.
        network: Name,
        /// The port.
        port: IfName,
    },
    /// Another port has this address.
    #[error("the address {mac} is that of {holder} already")]
    MacTaken {
        /// The address.
        mac: MacAddress,
        /// Whose it is.
        holder: String,
    },
    /// A record of snapctl's own cannot be read.
    #[error("{} cannot be understood: {fault}", file.display())]
    BadRecord {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        fault: String,
    },
    /// It failed, and what had been done could not be undone as a whole.
    #[error("{fault}; this could not be taken back: {left}")]
    PartlyUndone {
        /// What failed first.
        fault: Box<NetError>,
        /// What is left, and why.
        left: String,
    },
    /// A part could not be taken away; the others are gone.
    #[error("network {network} is not stopped as a whole: {left}")]
    PartlyStopped {
        /// The network.
        network: Name,
        /// What is left, and why.
        left: String,
    },
    /// What was made is not what was asked for.
    #[error("network {network}: {what} was made, and {seen}")]
    NotAsMade {
        /// The network.
        network: Name,
        /// The part.
        what: String,
        /// What was seen instead.
        seen: String,
    },
}

impl From<ProgramError> for NetError {
    fn from(fault: ProgramError) -> Self {
        match fault {
            ProgramError::Interrupted(signal) => Self::Interrupted(signal),
            fault => Self::Program(fault),
        }
    }
}
