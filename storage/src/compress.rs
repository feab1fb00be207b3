//! Compressing a file beside itself, durably.

use std::fs;
use std::io;
use std::path::Path;

use host::Error as HostError;
use host::files;
use model::ByteSize;

use crate::file;
use crate::overlay::OverlayError;
use crate::publish;

/// zstd's own default. Source: zstd(1).
const LEVEL: i32 = 3;

/// Compresses `from` into `to` with zstd, checksums included, and removes `from`. The new file has the owner of the old one,
/// may be read by its owner alone, and is durable when it is there. Returns what it takes.
///
/// What an attempt left that was broken off is replaced.
///
/// # Errors
/// [`OverlayError`]; `from` stays then.
pub fn compress(from: &Path, to: &Path) -> Result<ByteSize, OverlayError> {
    let source = file::open(from)?;
    publish::replace(to, from, 0o400, |target| {
        let mut encoder = zstd::Encoder::new(target, LEVEL)?;
        encoder.include_checksum(true)?;
        io::copy(&mut &source.file, &mut encoder)?;
        encoder.finish().map(drop)
    })?;
    files::remove_durably(from)?;
    let written = fs::metadata(to).map_err(HostError::io("look at", to))?;
    Ok(ByteSize(written.len()))
}

/// Reads all of a compressed file, and gives the size of what it holds.
///
/// # Errors
/// [`HostError`] if it is cut off, or a checksum does not fit.
pub fn verify(path: &Path) -> Result<ByteSize, HostError> {
    let opened = file::open(path)?;
    let read =
        zstd::Decoder::new(&opened.file).and_then(|mut decoder| io::copy(&mut decoder, &mut io::sink()));
    read.map(ByteSize).map_err(HostError::io("decompress", path))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use super::*;
    use crate::publish::partial;

    #[test]
    fn what_is_compressed_reads_back_and_a_damaged_byte_shows() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("m"), dir.path().join("m.zst"));
        let text: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
        fs::write(&from, &text).unwrap();
        fs::write(partial(&to), "of a killed one").unwrap();
        let size = compress(&from, &to).unwrap();
        assert!(size.0 > 0 && size.0 < text.len() as u64 && !from.exists() && !partial(&to).exists());
        assert_eq!(verify(&to).unwrap().0, text.len() as u64);
        fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).unwrap();
        let file = File::options().write(true).open(&to).unwrap();
        file.write_all_at(b"?", size.0 / 2).unwrap();
        assert!(verify(&to).is_err());
        file.set_len(size.0 / 2).unwrap();
        assert!(verify(&to).is_err());
    }
}
