//! The programs that the lab and the demo call, and the packages that bring them.
//!
//! Shared with `xtask`, which installs what is missing, so it uses the standard library only.

use std::path::{Path, PathBuf};

/// Program and the Debian or Ubuntu package that brings it.
pub const PROGRAMS: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("mke2fs", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("dumpe2fs", "e2fsprogs"),
    ("setpriv", "util-linux"),
    ("modprobe", "kmod"),
    ("depmod", "kmod"),
    ("ldd", "libc-bin"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("swtpm", "swtpm"),
    ("lvs", "lvm2"),
    ("dmsetup", "dmsetup"),
    ("thin_delta", "thin-provisioning-tools"),
    ("btrfs", "btrfs-progs"),
    ("mkfs.xfs", "xfsprogs"),
    ("sfdisk", "fdisk"),
    ("partx", "util-linux"),
    ("blkid", "util-linux"),
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("nft", "nftables"),
    ("dnsmasq", "dnsmasq-base"),
    ("ping", "iputils-ping"),
    ("busybox", "busybox-static"),
    ("apt-get", "apt"),
    ("apt-cache", "apt"),
    ("dpkg-deb", "dpkg"),
];

/// Where programs of the system administrator live that a plain user's PATH leaves out.
const SYSTEM_DIRS: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Returns where `program` is: in PATH, or in a directory for system programs.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = SYSTEM_DIRS.iter().map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|dir| dir.join(program)).find(|file| is_program(file))
}

/// Returns the entries of [`PROGRAMS`] that this machine lacks.
pub fn missing() -> Vec<(&'static str, &'static str)> {
    PROGRAMS.iter().copied().filter(|(program, _)| find(program).is_none()).collect()
}

fn is_program(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
