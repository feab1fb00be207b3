//! The descriptor of a VMDK image, read by somebody who does not trust it.
//!
//! A descriptor is a text that may name other files: extents, and a parent. Any of them would be opened by QEMU, so
//! that all of them are looked at here first: an extent has to be a plain file beside the image, a parent is refused.
//!
//! Source: VMware "Virtual Disk Format 5.0" (the sparse header and the descriptor file); QEMU block/vmdk.c for what
//! is followed.

use std::io;
use std::path::{Path, PathBuf};

use host::Error as HostError;
use host::files::parent;
use model::ByteSize;

use crate::file;
use crate::qcow2::ReadAt;

/// The first bytes of a sparse extent with a header, and of a descriptor that is a file by itself.
pub const MAGIC: [u8; 4] = *b"KDMV";
const TEXT_MAGIC: &[u8] = b"# Disk DescriptorFile";

/// Most of a descriptor that is read, in bytes; QEMU writes one of 10 KiB.
const DESCRIPTOR_MAX: u64 = 64 << 10;
/// Most extents; a 2 GiB split of 62 TiB has as many.
const EXTENTS_MAX: usize = 31_744;
/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Largest disk, as QEMU has it.
const SIZE_MAX: u64 = i64::MAX as u64;

/// A VMDK image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VmdkError {
    /// It cannot be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// It holds something else than such an image does.
    #[error("{} is not a sound VMDK image: {fault}", path.display())]
    Fault {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        fault: String,
    },
    /// It names a file that it must not.
    #[error("{} names {name:?} as {role}, which is not a plain file beside it", path.display())]
    Outside {
        /// The image.
        path: PathBuf,
        /// What the file would be to it.
        role: &'static str,
        /// The name as it stands there.
        name: String,
    },
}

/// What a VMDK says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vmdk {
    /// The size that the guest sees.
    pub capacity: ByteSize,
    /// Other files that hold its data, as plain names; none if all is in the one.
    pub extents: Vec<String>,
}

/// Reads the image at `path`, and refuses what names files that are not beside it.
///
/// # Errors
/// [`VmdkError`].
pub fn read(path: &Path) -> Result<Vmdk, VmdkError> {
    let found = parse(&file::open(path)?.file, path)?;
    for extent in &found.extents {
        let beside = parent(path).join(extent);
        // Not a link either: what it leads to may be anywhere.
        if !std::fs::symlink_metadata(&beside).is_ok_and(|metadata| metadata.is_file()) {
            return Err(VmdkError::Outside {
                path: path.to_owned(),
                role: "an extent",
                name: extent.clone(),
            });
        }
    }
    Ok(found)
}

/// As [`read`], from bytes, without a look at the files that it names.
///
/// # Errors
/// [`VmdkError`].
pub fn parse(image: &(impl ReadAt + ?Sized), path: &Path) -> Result<Vmdk, VmdkError> {
    let head = bytes(image, path, 0, SECTOR)?;
    if head.starts_with(TEXT_MAGIC) {
        let text = bytes(image, path, 0, DESCRIPTOR_MAX)?;
        return Descriptor::read(path, &text)?.on_its_own();
    }
    let fault = |fault: &str| VmdkError::Fault { path: path.to_owned(), fault: fault.to_owned() };
    if !head.starts_with(&MAGIC) {
        return Err(fault("it begins neither with KDMV nor with a descriptor"));
    }
    let number =
        |at: usize| -> Option<u64> { Some(u64::from_le_bytes(head.get(at..at + 8)?.try_into().ok()?)) };
    let (capacity, at, length) = (number(12), number(28), number(36));
    let (Some(capacity), Some(at), Some(length)) = (capacity, at, length) else {
        return Err(fault("its header is cut off"));
    };
    // QEMU takes a header of capacity 0 for a descriptor that may name other files.
    let size = capacity.checked_mul(SECTOR).filter(|size| (1..=SIZE_MAX).contains(size));
    let size = size.ok_or_else(|| fault("its capacity is none, or more than any disk has"))?;
    if at == 0 {
        return Ok(Vmdk { capacity: ByteSize(size), extents: Vec::new() });
    }
    let place = at.checked_mul(SECTOR).zip(length.checked_mul(SECTOR));
    let (from, length) = place.ok_or_else(|| fault("its descriptor lies beyond any file"))?;
    let text = bytes(image, path, from, length.min(DESCRIPTOR_MAX))?;
    Descriptor::read(path, &text)?.in_the_image(ByteSize(size))
}

/// What a descriptor says.
struct Descriptor<'a> {
    path: &'a Path,
    extents: Vec<(u64, String)>,
}

impl<'a> Descriptor<'a> {
    fn read(path: &'a Path, text: &[u8]) -> Result<Self, VmdkError> {
        let fault = |fault: &str| VmdkError::Fault { path: path.to_owned(), fault: fault.to_owned() };
        let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
        let text = std::str::from_utf8(&text[..end]).map_err(|_| fault("its descriptor is no text"))?;
        let mut extents = Vec::new();
        for line in text.lines() {
            let line = line.trim();
            // QEMU looks for the word anywhere.
            if line.contains("parentFileNameHint") {
                let name =
                    line.split_once('=').map_or(line, |(_, name)| name).trim().trim_matches('"').to_owned();
                return Err(VmdkError::Outside { path: path.to_owned(), role: "its parent", name });
            }
            let access = line.split_ascii_whitespace().next().unwrap_or_default();
            if ["RW", "RDONLY", "NOACCESS"].contains(&access) {
                extents
                    .push(extent(line).ok_or_else(|| fault("an extent in its descriptor cannot be read"))?);
            }
            if extents.len() > EXTENTS_MAX {
                return Err(fault("it has too many extents"));
            }
        }
        Ok(Self { path, extents })
    }

    /// The descriptor is the whole image: the data is in the files that it names.
    fn on_its_own(self) -> Result<Vmdk, VmdkError> {
        let sectors = self.extents.iter().try_fold(0u64, |sum, (sectors, _)| sum.checked_add(*sectors));
        let size = sectors.and_then(|sectors| sectors.checked_mul(SECTOR));
        let size = size.filter(|size| (1..=SIZE_MAX).contains(size)).ok_or_else(|| VmdkError::Fault {
            path: self.path.to_owned(),
            fault: "its extents make no disk of a possible size".into(),
        })?;
        let extents = self.extents.into_iter().map(|(_, name)| name);
        let extents: Result<Vec<String>, VmdkError> = extents.map(|name| plain(self.path, name)).collect();
        Ok(Vmdk { capacity: ByteSize(size), extents: extents? })
    }

    /// The descriptor is part of the image that holds the data; what it calls that is of no consequence.
    fn in_the_image(self, capacity: ByteSize) -> Result<Vmdk, VmdkError> {
        Ok(Vmdk { capacity, extents: Vec::new() })
    }
}

/// `RW 4192256 SPARSE "name.vmdk"`: sectors and name. An extent of zeroes has no file, and is none that is handled.
fn extent(line: &str) -> Option<(u64, String)> {
    let sectors = line.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let (_, rest) = line.split_once('"')?;
    let (name, _) = rest.split_once('"')?;
    Some((sectors, name.to_owned()))
}

/// A name without a directory and without what QEMU takes for a protocol.
fn plain(path: &Path, name: String) -> Result<String, VmdkError> {
    let is_plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', ':', '\\']);
    if is_plain && !name.contains(char::is_control) {
        return Ok(name);
    }
    let name = name.escape_debug().take(200).collect();
    Err(VmdkError::Outside { path: path.to_owned(), role: "an extent", name })
}

fn bytes(image: &(impl ReadAt + ?Sized), path: &Path, from: u64, length: u64) -> Result<Vec<u8>, VmdkError> {
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    let read =
        image.read_at(&mut bytes, from).map_err(|fault: io::Error| HostError::io("read", path)(fault))?;
    bytes.truncate(read);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(lines: &str) -> Result<Vmdk, VmdkError> {
        let bytes = format!("# Disk DescriptorFile\nversion=1\n{lines}\n");
        parse(bytes.as_bytes(), Path::new("a.vmdk"))
    }

    fn sparse(capacity: u64, descriptor: &str) -> Result<Vmdk, VmdkError> {
        let mut bytes = vec![0; 512];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[12..20].copy_from_slice(&capacity.to_le_bytes());
        bytes[28..36].copy_from_slice(&1u64.to_le_bytes());
        bytes[36..44].copy_from_slice(&20u64.to_le_bytes());
        bytes.extend(descriptor.as_bytes());
        parse(bytes.as_slice(), Path::new("a.vmdk"))
    }

    #[test]
    fn extents_beside_the_image_are_told_and_others_refused() {
        let found = text("RW 2048 FLAT \"a-flat.vmdk\" 0\nRW 2048 FLAT \"b-flat.vmdk\" 0").unwrap();
        assert_eq!(found.capacity, ByteSize(2 << 20));
        assert_eq!(found.extents, ["a-flat.vmdk", "b-flat.vmdk"]);
        for name in ["/etc/shadow", "../x.vmdk", "a/b", "nbd:host", "", ".hidden", "a\\b"] {
            let fault = text(&format!("RW 2048 FLAT \"{name}\" 0")).unwrap_err();
            assert!(matches!(fault, VmdkError::Outside { .. }), "{name}: {fault}");
        }
        for broken in ["RW x FLAT \"a\"", "RW 8 FLAT a", "RW 99999999999999999 FLAT \"a\"", ""] {
            assert!(text(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn a_parent_is_refused_wherever_it_stands() {
        for descriptor in ["parentFileNameHint=\"/etc/shadow\"", "x parentFileNameHint = \"b.vmdk\""] {
            for fault in [text(descriptor).unwrap_err(), sparse(8, descriptor).unwrap_err()] {
                assert!(matches!(fault, VmdkError::Outside { role: "its parent", .. }), "{fault}");
            }
        }
    }

    #[test]
    fn a_sparse_image_names_nothing_and_its_capacity_is_bounded() {
        let found = sparse(16, "RW 16 SPARSE \"/anything/at/all\"").unwrap();
        assert_eq!(found, Vmdk { capacity: ByteSize(8192), extents: Vec::new() });
        assert!(sparse(0, "").is_err() && sparse(u64::MAX, "").is_err());
        for cut in [&b""[..], b"KDMV", b"KDMV\0\0\0\0", b"QFI\xfb"] {
            assert!(parse(cut, Path::new("a")).is_err());
        }
    }
}
