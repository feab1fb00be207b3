//! Who may drive a VM through its sockets.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Write permission of others: what connecting to a socket needs.
const OTHERS_WRITE: u32 = 0o002;
/// Search permission of others: what coming by a directory needs.
const OTHERS_SEARCH: u32 = 0o001;

/// Whether every user of this host may connect to the socket at `path`: then each of them can do what QEMU can, read and
/// write any of its files included. False if it cannot be told.
///
/// Source: unix(7), "Pathname socket ownership and permissions"; QEMU docs/system/security.rst, "Monitor console".
pub fn is_open_to_all(path: &Path) -> bool {
    let allows = |path: &Path, bit: u32| {
        std::fs::metadata(path).is_ok_and(|found| found.permissions().mode() & bit != 0)
    };
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    allows(&real, OTHERS_WRITE) && real.ancestors().skip(1).all(|dir| allows(dir, OTHERS_SEARCH))
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn q17_a_socket_is_open_to_all_if_it_and_its_directories_are() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let _listener = UnixListener::bind(&socket).unwrap();
        let set = |path: &Path, mode| set_permissions(path, Permissions::from_mode(mode)).unwrap();
        // A private directory is enough, and so is a private socket.
        for (of_dir, of_socket, open) in
            [(0o700, 0o777, false), (0o755, 0o755, false), (0o755, 0o777, true), (0o711, 0o666, true)]
        {
            set(dir.path(), of_dir);
            set(&socket, of_socket);
            assert_eq!(is_open_to_all(&socket), open, "{of_dir:o} {of_socket:o}");
        }
        assert!(!is_open_to_all(&dir.path().join("none")));
    }
}
