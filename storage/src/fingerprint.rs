//! Taking the fingerprint of a frozen layer, and hashing all of it.

use std::fs::Metadata;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use host::Error as HostError;
use jiff::Timestamp;
use model::{ByteSize, Digest, Fingerprint, ImageFormat};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::file;
use crate::qcow2::{Header, Qcow2Error};

/// Of an image that is not qcow2, so many bytes: partition tables and first superblocks are there.
const BEGINNING: u64 = 64 << 10;
/// Most that is read of each of a qcow2 image's tables. QEMU refuses L1 tables of more than 32 MiB.
const TABLE_MAX: u64 = 32 << 20;
const PIECE: usize = 1 << 20;

/// Takes the fingerprint of the image at `path`, but for its content.
///
/// # Errors
/// [`Qcow2Error`] if it cannot be read, or is no image of `format`.
pub fn take(path: &Path, format: ImageFormat) -> Result<Fingerprint, Qcow2Error> {
    let opened = file::open(path)?;
    let mut hasher = blake3::Hasher::new();
    for (offset, length) in parts(&opened.file, path, format)? {
        hash_part(&opened.file, offset, length, &mut hasher).map_err(HostError::io("read", path))?;
    }
    Ok(Fingerprint {
        inode: opened.metadata.ino(),
        size: ByteSize(opened.metadata.len()),
        modified: modified(&opened.metadata),
        tables: digest(&hasher),
        content: None,
    })
}

/// Hashes all of the file at `path`. Holes count as the zeroes that they read as. None as soon as `stop` says so.
///
/// # Errors
/// [`HostError`] if it cannot be read.
pub fn content(path: &Path, mut stop: impl FnMut(ByteSize) -> bool) -> Result<Option<Digest>, HostError> {
    let opened = file::open(path)?;
    let size = opened.metadata.len();
    let (mut hasher, mut bytes, zeroes) = (blake3::Hasher::new(), vec![0; PIECE], vec![0; PIECE]);
    let (mut at, mut data) = (0, 0..0);
    while at < size {
        if stop(ByteSize(at)) {
            return Ok(None);
        }
        if at >= data.end {
            data = next_data(&opened.file, at, size).map_err(HostError::io("find data in", path))?;
        }
        let hole = at < data.start;
        let end = if hole { data.start } else { data.end };
        let length = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
        if !hole {
            opened.file.read_exact_at(&mut bytes[..length], at).map_err(HostError::io("read", path))?;
        }
        let piece = if hole { &zeroes[..length] } else { &bytes[..length] };
        hasher.update(piece);
        at += length as u64;
    }
    Ok(Some(digest(&hasher)))
}

/// What is hashed of an image's structure: offsets and lengths in bytes.
fn parts(file: &std::fs::File, path: &Path, format: ImageFormat) -> Result<Vec<(u64, u64)>, Qcow2Error> {
    if format != ImageFormat::Qcow2 {
        return Ok(vec![(0, BEGINNING)]);
    }
    let header = Header::read(file, path)?;
    let cluster = header.cluster_size();
    let refcount_table = u64::from(header.refcount_table_clusters).saturating_mul(cluster);
    Ok(vec![
        (0, cluster),
        (header.l1_offset, u64::from(header.l1_entries).saturating_mul(8).min(TABLE_MAX)),
        (header.refcount_table_offset, refcount_table.min(TABLE_MAX)),
    ])
}

/// Hashes a part, as far as there is one.
fn hash_part(
    file: &std::fs::File,
    offset: u64,
    length: u64,
    hasher: &mut blake3::Hasher,
) -> std::io::Result<()> {
    let mut bytes = vec![0; PIECE];
    let mut done = 0;
    while done < length {
        let piece = usize::try_from(length - done).unwrap_or(PIECE).min(PIECE);
        match file.read_at(&mut bytes[..piece], offset.saturating_add(done))? {
            0 => break,
            count => {
                hasher.update(&bytes[..count]);
                done += count as u64;
            }
        }
    }
    Ok(())
}

/// The first run of data at or behind `at`; an empty one at the end if only a hole is left.
///
/// Source: lseek(2), `SEEK_DATA`. Where a file system does not know holes, all is data.
fn next_data(file: &std::fs::File, at: u64, size: u64) -> std::io::Result<std::ops::Range<u64>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(size..size),
        Err(Errno::INVAL) => return Ok(at..size),
        Err(fault) => return Err(fault.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok(start.min(size)..end.min(size))
}

fn modified(metadata: &Metadata) -> Timestamp {
    let nanoseconds = i32::try_from(metadata.mtime_nsec()).unwrap_or(0);
    Timestamp::new(metadata.mtime(), nanoseconds).unwrap_or(Timestamp::UNIX_EPOCH)
}

fn digest(hasher: &blake3::Hasher) -> Digest {
    Digest(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Seek, Write};

    use super::*;

    fn sparse() -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"first").unwrap();
        file.seek(std::io::SeekFrom::Start(5 << 20)).unwrap();
        file.write_all(b"second").unwrap();
        file.as_file().set_len(9 << 20).unwrap();
        file
    }

    #[test]
    fn holes_read_as_zeroes_and_a_stop_gives_none() {
        let file = sparse();
        let whole = std::fs::read(file.path()).unwrap();
        let expected = blake3::hash(&whole).to_hex().to_string();
        assert_eq!(content(file.path(), |_| false).unwrap().unwrap().0, expected);
        assert_eq!(content(file.path(), |at| at.0 > 1 << 20).unwrap(), None);
    }

    #[test]
    fn a_write_changes_the_content_and_one_at_the_beginning_the_tables_too() {
        let file = sparse();
        let all = || {
            (take(file.path(), ImageFormat::Raw).unwrap(), content(file.path(), |_| false).unwrap().unwrap())
        };
        let (before, content_before) = all();
        let writer = File::options().write(true).open(file.path()).unwrap();
        writer.write_all_at(b"x", 7 << 20).unwrap();
        let (middle, content_middle) = all();
        assert_eq!(before.tables, middle.tables);
        assert_ne!(content_before, content_middle);
        writer.write_all_at(b"x", 0).unwrap();
        let (after, _) = all();
        assert_ne!(middle.tables, after.tables);
        assert_eq!((before.inode, before.size), (after.inode, after.size));
    }
}
