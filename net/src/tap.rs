//! Taps: the host's end of a guest's NIC.
//!
//! Source: Documentation/networking/tuntap.rst, linux/if_tun.h.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use host::Error as HostError;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Opcode, Setter, ioctl};

use crate::{IfName, NetError};

const DEVICE: &str = "/dev/net/tun";

const TUNSETIFF: Opcode = 0x4004_54ca;
const TUNSETPERSIST: Opcode = 0x4004_54cb;
const TUNSETOWNER: Opcode = 0x4004_54cc;

const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_TUN_EXCL: u16 = 0x8000;

/// `struct ifreq`: a name, and a union of which the flags are used.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Makes a tap that stays until it is removed.
///
/// `multi_queue` lets QEMU open it several times; `owner` is the user who may open it beside root.
///
/// # Errors
/// [`NetError::InterfaceTaken`] if there is an interface of that name; [`NetError::NoPrivilege`]; [`NetError::Host`].
pub fn make(name: &IfName, multi_queue: bool, owner: Option<u32>) -> Result<(), NetError> {
    let file = attach(name, multi_queue, true)?;
    let what = || format!("make the tap {name}");
    if let Some(owner) = owner {
        set::<TUNSETOWNER>(&file, owner as usize).map_err(|errno| refused(errno, name, what()))?;
    }
    set::<TUNSETPERSIST>(&file, 1).map_err(|errno| refused(errno, name, what()))
}

/// Opens one queue of a tap, as QEMU's `fd=` wants it; makes the tap if `new`.
///
/// # Errors
/// As [`make`].
pub fn attach(name: &IfName, multi_queue: bool, new: bool) -> Result<OwnedFd, NetError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::open(DEVICE, flags, Mode::empty())
        .map_err(|errno| HostError::io("open", DEVICE.as_ref())(errno.into()))?;
    let mut request = Request { name: [0; 16], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, rest: [0; 22] };
    request.name[..name.as_str().len()].copy_from_slice(name.as_str().as_bytes());
    if multi_queue {
        request.flags |= IFF_MULTI_QUEUE;
    }
    if new {
        request.flags |= IFF_TUN_EXCL;
    }
    set_interface(&file, request).map_err(|errno| refused(errno, name, format!("make the tap {name}")))?;
    Ok(file)
}

fn refused(errno: Errno, name: &IfName, what: String) -> NetError {
    match errno {
        Errno::BUSY | Errno::EXIST => {
            NetError::InterfaceTaken { name: name.clone(), why: "is in use".into() }
        }
        Errno::PERM | Errno::ACCESS => NetError::NoPrivilege { what },
        errno => NetError::Netlink { what, fault: std::io::Error::from(errno).to_string() },
    }
}

#[expect(unsafe_code, reason = "rustix has no typed call for TUNSETIFF")]
fn set_interface(file: &OwnedFd, request: Request) -> Result<(), Errno> {
    // SAFETY: the request takes a pointer to a `struct ifreq` of 40 bytes, which `Request` is, and keeps none.
    unsafe { ioctl(file.as_fd(), Setter::<TUNSETIFF, Request>::new(request)) }
}

#[expect(unsafe_code, reason = "rustix has no typed calls for these")]
fn set<const REQUEST: Opcode>(file: &OwnedFd, value: usize) -> Result<(), Errno> {
    // SAFETY: both requests take a number by value, and no pointer.
    unsafe { ioctl(file.as_fd(), IntegerSetter::<REQUEST>::new_usize(value)) }
}

/// Whether taps can be had on this host, or what is missing.
pub fn missing() -> Option<String> {
    File::options().read(true).write(true).open(DEVICE).err().map(|fault| format!("{DEVICE}: {fault}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_has_the_kernels_size() {
        assert_eq!(size_of::<Request>(), 40);
    }
}
