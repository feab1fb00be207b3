//! Who holds a unix socket.
//!
//! QEMU serves one client on a monitor or an agent socket. A second one connects without an error and
//! then hears nothing, so a tool that finds silence wants to know whom to blame. The kernel knows: its
//! socket table names, for each accepted socket, the path it was accepted on and the inode of the socket
//! at the other end, and `/proc` tells whose descriptor that is.
//!
//! Source: sock_diag(7) `UDIAG_SHOW_NAME`, `UDIAG_SHOW_VFS`, `UDIAG_SHOW_PEER`; proc(5) `/proc/pid/fd`.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::unix::nlas::{Nla, UnixDiagName, Vfs};
use netlink_packet_sock_diag::unix::{ShowFlags, StateFlags, UnixRequest, UnixResponse};
use netlink_packet_sock_diag::{SockDiagMessage, TCP_ESTABLISHED, TCP_LISTEN};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};

use crate::error::printable;
use crate::procfs;

/// One message of a dump; the kernel fills at most 32 KiB.
const DUMP_BUFFER: usize = 64 << 10;

/// Where a netlink message says its length, and how its successor is aligned. Source: linux/netlink.h.
const NETLINK_HEADER: usize = 16;

/// Longest command line that is shown, in characters.
const SHOWN_COMMAND_LINE: usize = 300;

/// A process that is connected to a socket as its client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its pid.
    pub pid: u32,
    /// The kernel's name for it, fit for a terminal.
    pub comm: String,
    /// Its arguments, joined by spaces, cut at 300 characters, fit for a terminal.
    pub command_line: String,
}

/// What could be learnt of a socket's clients.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holders {
    /// The processes other than this one, by pid. A socket that is shared by several names them all.
    pub list: Vec<Holder>,
    /// Whether that is all: the socket was found, and so was the owner of each connection. False where
    /// other users' processes cannot be seen, and for a socket of another network namespace.
    pub certain: bool,
}

/// Returns the processes other than this one whose connection on the listening socket `path` is
/// accepted. One that waits to be accepted holds nothing.
///
/// The socket is known by its file, or by the path it was bound to where the file is gone.
pub fn holders(path: &Path) -> Holders {
    let Some(peers) = Table::read().ok().and_then(|table| table.peers(path)) else {
        return Holders::default();
    };
    let mut missing: HashSet<u64> = peers.iter().copied().collect();
    let mut list = Vec::new();
    for pid in if peers.is_empty() { Vec::new() } else { procfs::pids() } {
        let Some(open) = procfs::socket_inodes(pid) else { continue };
        let held: Vec<u64> = open.into_iter().filter(|inode| peers.contains(inode)).collect();
        if !held.is_empty() && pid != std::process::id() {
            list.push(describe(pid));
        }
        held.iter().for_each(|inode| {
            missing.remove(inode);
        });
    }
    Holders { list, certain: missing.is_empty() }
}

/// Whether another process's connection is accepted on the listening socket `path`.
///
/// `None` where the kernel does not tell: no `sock_diag`, or a socket of another network namespace.
pub fn is_held(path: &Path) -> Option<bool> {
    let peers = Table::read().ok()?.peers(path)?;
    let ours = procfs::socket_inodes(std::process::id())?;
    Some(peers.iter().any(|peer| !ours.contains(peer)))
}

fn describe(pid: u32) -> Holder {
    let words = procfs::command_line(pid).unwrap_or_default();
    let line = words.iter().map(|word| String::from_utf8_lossy(word)).collect::<Vec<_>>().join(" ");
    Holder {
        pid,
        comm: printable(&procfs::comm(pid).unwrap_or_default(), 64),
        command_line: printable(&line, SHOWN_COMMAND_LINE),
    }
}

/// A listening or connected unix socket, as the kernel lists it.
struct Entry {
    listens: bool,
    /// 0 for one that nobody has accepted yet.
    inode: u32,
    /// The path it was bound to, or accepted on.
    name: Option<PathBuf>,
    /// The file of that path.
    file: Option<Vfs>,
    /// The inode of the other end; 0 for one that was closed.
    peer: Option<u32>,
}

impl From<&UnixResponse> for Entry {
    fn from(response: &UnixResponse) -> Self {
        let name = match response.name() {
            Some(UnixDiagName::Pathname(name)) => Some(PathBuf::from(name)),
            _ => None,
        };
        let file = response.nlas.iter().find_map(|nla| match nla {
            Nla::Vfs(file) => Some(file.clone()),
            _ => None,
        });
        let listens = response.header.state == TCP_LISTEN;
        Self { listens, inode: response.header.inode, name, file, peer: response.peer() }
    }
}

/// The unix sockets of this network namespace.
struct Table(Vec<Entry>);

impl Table {
    fn read() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.send(&request(), 0)?;
        let mut entries = Vec::new();
        let mut buffer = Vec::with_capacity(DUMP_BUFFER);
        loop {
            buffer.clear();
            if socket.recv(&mut buffer, 0)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if take_entries(&buffer, &mut entries)? {
                return Ok(Self(entries));
            }
        }
    }

    /// The inodes of the other ends of what was accepted on `path`, or `None` if nothing in the table
    /// belongs to it.
    fn peers(&self, path: &Path) -> Option<HashSet<u64>> {
        let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let file = file_of(path);
        // Where the listener is found by its file, a name proves nothing: an earlier QEMU's socket had it too.
        let by_file = file.is_some() && self.0.iter().any(|entry| entry.listens && entry.file == file);
        let belongs = |entry: &&Entry| match by_file {
            true => entry.file == file,
            false => entry.name.as_ref().is_some_and(|name| name == path || *name == real),
        };
        let mine: Vec<&Entry> = self.0.iter().filter(belongs).collect();
        let accepted = mine.iter().filter(|entry| !entry.listens && entry.inode != 0);
        let peers =
            accepted.filter_map(|entry| entry.peer).filter(|peer| *peer != 0).map(u64::from).collect();
        (!mine.is_empty()).then_some(peers)
    }
}

fn request() -> Vec<u8> {
    let wanted = UnixRequest {
        state_flags: StateFlags::ESTABLISHED | StateFlags::LISTEN,
        inode: 0,
        show_flags: ShowFlags::NAME | ShowFlags::VFS | ShowFlags::PEER,
        cookie: [0xff; 8],
    };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut message = NetlinkMessage::new(header, SockDiagMessage::UnixRequest(wanted).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// Takes what one read brought; true when the dump is complete.
///
/// An entry that cannot be understood is left out: it is somebody else's odd socket.
fn take_entries(mut bytes: &[u8], entries: &mut Vec<Entry>) -> io::Result<bool> {
    while let Some(length) = message_length(bytes) {
        match NetlinkMessage::<SockDiagMessage>::deserialize(&bytes[..length]).map(|message| message.payload)
        {
            Ok(NetlinkPayload::Done(_)) => return Ok(true),
            Ok(NetlinkPayload::Error(error)) => return Err(error.to_io()),
            Ok(NetlinkPayload::InnerMessage(SockDiagMessage::UnixResponse(response)))
                if matches!(response.header.state, TCP_ESTABLISHED | TCP_LISTEN) =>
            {
                entries.push(Entry::from(&*response));
            }
            _ => {}
        }
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    Ok(false)
}

fn message_length(bytes: &[u8]) -> Option<usize> {
    let length = u32::from_ne_bytes(bytes.first_chunk().copied()?) as usize;
    (NETLINK_HEADER..=bytes.len()).contains(&length).then_some(length)
}

/// The file of a path in the kernel's own numbers: 32 bits of the inode, and the device as
/// `major << 20 | minor`. Source: linux/unix_diag.h `struct unix_diag_vfs`, linux/kdev_t.h.
fn file_of(path: &Path) -> Option<Vfs> {
    let stat = rustix::fs::stat(path).ok()?;
    let device = (rustix::fs::major(stat.st_dev) << 20) | rustix::fs::minor(stat.st_dev);
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&(stat.st_ino as u32).to_ne_bytes());
    bytes[4..].copy_from_slice(&device.to_ne_bytes());
    Vfs::parse(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    /// A process whose only hold on the connection is its stdin.
    fn client(stream: UnixStream) -> Child {
        Command::new("cat").stdin(OwnedFd::from(stream)).stdout(Stdio::null()).spawn().unwrap()
    }

    /// Waits until `look` says yes. Another test's child may hold a copy of a descriptor for the moment
    /// between its fork and its exec.
    fn settles(look: impl Fn() -> bool) -> bool {
        let limit = Instant::now() + Duration::from_secs(20);
        while Instant::now() < limit {
            if look() {
                return true;
            }
            std::thread::yield_now();
        }
        false
    }

    fn free_for_certain(path: &Path) -> bool {
        settles(|| holders(path) == Holders { list: vec![], certain: true } && is_held(path) == Some(false))
    }

    fn connect(listener: &UnixListener, path: &Path) -> (UnixStream, UnixStream) {
        let client = UnixStream::connect(path).unwrap();
        (client, listener.accept().unwrap().0)
    }

    #[test]
    fn g9_the_holder_is_named_until_it_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        assert!(free_for_certain(&path));

        let (stream, server) = connect(&listener, &path);
        let mut child = client(stream);
        let cat = Holder { pid: child.id(), comm: "cat".into(), command_line: "cat".into() };
        assert!(settles(|| holders(&path) == Holders { list: vec![cat.clone()], certain: true }));
        assert_eq!(is_held(&path), Some(true));

        drop(server);
        child.wait().unwrap();
        assert!(free_for_certain(&path));
    }

    #[test]
    fn g9_a_real_qemu_s_client_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let mut qemu = Command::new("qemu-system-x86_64")
            .args(["-machine", "none", "-nodefaults", "-display", "none"])
            .args(["-qmp", "unix:qmp,server=on,wait=off"])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let listens = settles(|| is_held(&path) == Some(false));
        let greeted = UnixStream::connect(&path).map(|mut stream| {
            stream.read_exact(&mut [0; 7]).unwrap();
            stream
        });
        let mut child = greeted.map(client).unwrap();
        let named = settles(|| holders(&path).list.iter().any(|holder| holder.pid == child.id()));
        let held = is_held(&path);
        qemu.kill().unwrap();
        qemu.wait().unwrap();
        child.wait().unwrap();
        assert!(listens && named && held == Some(true), "{listens} {named} {held:?}");
    }

    #[test]
    fn one_that_waits_to_be_accepted_holds_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let mut waiting = client(UnixStream::connect(&path).unwrap());
        assert!(free_for_certain(&path));
        drop(listener.accept().unwrap());
        waiting.wait().unwrap();
    }

    #[test]
    fn this_process_does_not_hold_the_socket_against_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let _both = connect(&listener, &path);
        assert!(free_for_certain(&path));
    }

    #[test]
    fn the_socket_is_known_by_its_file_through_links_and_new_names() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link, moved) = (dir.path().join("qmp"), dir.path().join("link"), dir.path().join("moved"));
        let listener = UnixListener::bind(&path).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let (stream, server) = connect(&listener, &path);
        let mut child = client(stream);
        assert_eq!(is_held(&link), Some(true));
        std::fs::rename(&path, &moved).unwrap();
        assert_eq!(is_held(&moved), Some(true));

        // A new QEMU on the old path is not held because the old one's client lives.
        let _second = UnixListener::bind(&path).unwrap();
        assert!(free_for_certain(&path));
        drop(server);
        child.wait().unwrap();
    }

    #[test]
    fn a_removed_file_leaves_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let (stream, server) = connect(&listener, &path);
        let mut child = client(stream);
        std::fs::remove_file(&path).unwrap();
        assert!(settles(|| holders(&path).list.len() == 1));
        drop(server);
        child.wait().unwrap();
    }

    #[test]
    fn of_an_unknown_socket_nothing_is_certain() {
        let path = Path::new("/nonexistent/qmp");
        assert_eq!(holders(path), Holders { list: vec![], certain: false });
        assert_eq!(is_held(path), None);
    }

    #[test]
    fn lengths_that_lie_end_the_reading() {
        let mut entries = Vec::new();
        for bytes in [&[][..], &[1, 0, 0], &[3, 0, 0, 0, 0], &[0xff; 40], &[0; 40]] {
            assert!(!take_entries(bytes, &mut entries).unwrap(), "{bytes:?}");
        }
        assert!(entries.is_empty());
    }
}
