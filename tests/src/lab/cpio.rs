//! An initramfs written by hand: no root is needed for its owners and device nodes.
//!
//! Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst, "newc".

use std::collections::BTreeSet;
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// A cpio archive in memory; every file belongs to root.
#[derive(Default)]
pub(super) struct Cpio {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    inode: u32,
}

impl Cpio {
    /// Adds an executable file at the absolute `path`, and the directories above it.
    pub(super) fn file(&mut self, path: &str, content: &[u8]) {
        self.parents(path);
        self.entry(path, PROGRAM, (0, 0), content);
    }

    /// Adds a symbolic link at the absolute `path`.
    pub(super) fn link(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entry(path, SYMLINK, (0, 0), target.as_bytes());
    }

    /// Adds a character device at the absolute `path`.
    pub(super) fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.parents(path);
        self.entry(path, CHARACTER_DEVICE, (major, minor), b"");
    }

    /// Returns the finished archive.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("/TRAILER!!!", 0, (0, 0), b"");
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        let above: Vec<&Path> = Path::new(path).ancestors().skip(1).collect();
        for directory in above.iter().rev().filter_map(|path| path.to_str()).filter(|path| *path != "/") {
            if self.directories.insert(directory.to_owned()) {
                self.entry(directory, DIRECTORY, (0, 0), b"");
            }
        }
    }

    fn entry(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.inode += 1;
        let name = path.trim_start_matches('/');
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let size = content.len() as u32;
        let name_size = name.len() as u32 + 1;
        // Inode, mode, uid, gid, links, mtime, size, device of the file, device it is, name, checksum.
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
