//! The disks in an OVA, which is a tar archive; QEMU reads them where they are.
//!
//! Source: DMTF DSP0243, "Open Virtualization Format", section on the OVA package.

use std::fs::File;
use std::path::Path;

use host::Error as HostError;

use super::source::Source;
use crate::file;
use crate::pool::{PoolError, VolumeFormat};
use crate::vmdk;

/// Most members that are looked at.
const MEMBERS_MAX: usize = 10_000;

/// Whether a file's name says that it is an OVA.
pub fn is_ova(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("ova"))
}

/// The disks in the archive, in its order.
///
/// # Errors
/// [`PoolError::Host`] if it is no archive; [`PoolError::Vmdk`] for a disk that names other files;
/// [`PoolError::Contradiction`] if there is no disk in it.
pub fn disks(path: &Path) -> Result<Vec<Source>, PoolError> {
    let opened = file::open(path)?;
    let unreadable = |fault: std::io::Error| HostError::io("read the archive", path)(fault);
    let mut archive = tar::Archive::new(&opened.file);
    let mut disks = Vec::new();
    for member in archive.entries_with_seek().map_err(unreadable)?.take(MEMBERS_MAX) {
        let member = member.map_err(unreadable)?;
        let name = member.path().map_err(unreadable)?.into_owned();
        // A manifest, a certificate, the description: no disks. Links in archives are nothing that is followed.
        let Some(format) = VolumeFormat::of_file(&name).filter(|_| member.header().entry_type().is_file())
        else {
            continue;
        };
        let part = (member.raw_file_position(), member.size());
        let size = match format {
            VolumeFormat::Vmdk => Some(vmdk_size(&opened.file, path, part)?),
            _ => {
                let what = format!("{} holds {}: disks in an OVA are VMDK", path.display(), name.display());
                return Err(PoolError::Contradiction(what));
            }
        };
        let (path, allocated) = (path.to_owned(), model::ByteSize(part.1));
        disks.push(Source {
            path,
            format,
            part: Some(part),
            size,
            allocated,
            backed: false,
            encrypted: false,
        });
    }
    if disks.is_empty() {
        return Err(PoolError::Contradiction(format!("{} holds no disk", path.display())));
    }
    Ok(disks)
}

fn vmdk_size(
    archive: &File,
    path: &Path,
    (offset, length): (u64, u64),
) -> Result<model::ByteSize, PoolError> {
    let found = vmdk::parse(&Part { archive, offset, length }, path)?;
    match found.extents.into_iter().next() {
        None => Ok(found.capacity),
        Some(name) => Err(vmdk::VmdkError::Outside { path: path.to_owned(), role: "an extent", name }.into()),
    }
}

/// A part of a file as an image.
struct Part<'a> {
    archive: &'a File,
    offset: u64,
    length: u64,
}

impl crate::qcow2::ReadAt for Part<'_> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let left = usize::try_from(self.length.saturating_sub(offset)).unwrap_or(usize::MAX);
        let count = buffer.len().min(left);
        crate::qcow2::ReadAt::read_at(self.archive, &mut buffer[..count], self.offset.saturating_add(offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_without_disks_or_with_links_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.ova");
        let mut archive = tar::Builder::new(Vec::new());
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(tar::EntryType::Symlink);
        link.set_size(0);
        archive.append_link(&mut link, "disk.vmdk", "/etc/shadow").unwrap();
        std::fs::write(&path, archive.into_inner().unwrap()).unwrap();
        assert!(matches!(disks(&path), Err(PoolError::Contradiction(_))));
        std::fs::write(&path, vec![7; 2000]).unwrap();
        assert!(matches!(disks(&path), Err(PoolError::Host(_))));
        assert!(is_ova(&path) && !is_ova(Path::new("a.vmdk")));
    }
}
