//! What the fuzzer does with its bytes, shared with the property tests in `storage/tests/images`.

use std::path::Path;

use storage::chain::is_protocol;
use storage::qcow2::map::{Extent, Map};
use storage::qcow2::{BACKING_NAME_MAX, Header, Qcow2Error, inside, is_pristine};

/// Reads the bytes as an image, and checks what must hold for every header that is not refused.
///
/// Most bytes are refused; that is not a failure. A panic is, and so is a header outside of its limits.
pub fn qcow2(bytes: &[u8]) {
    if let Ok(header) = Header::parse(bytes) {
        within_limits(&header);
    }
    let whole = Header::read(bytes, Path::new("image"));
    let pristine = is_pristine(bytes, Path::new("image"));
    // The text of a fault is made of what was found there.
    match (whole, pristine) {
        (Err(error), Err(_)) => assert!(!error.to_string().is_empty()),
        (Err(error), Ok(_)) => panic!("an unsound image was called pristine or written: {error}"),
        (Ok(header), pristine) => {
            within_limits(&header);
            tables(bytes, &header);
            assert!(header.internal_snapshots == 0 || !matches!(pristine, Ok(true)));
        }
    }
}

/// More stretches than this prove nothing more.
const EXTENTS_MAX: usize = 100_000;

/// Walks over everything that the header leads to.
fn tables(bytes: &[u8], header: &Header) {
    let path = Path::new("image");
    let budget = bytes.len() as u64 + header.cluster_size();
    covers(Map::new(bytes, header, path, budget), header.virtual_size.0);
    if let Ok(found) = inside::snapshots(bytes, header, path) {
        for snapshot in found.iter().take(16) {
            let size = snapshot.virtual_size.unwrap_or(header.virtual_size).0;
            covers(Map::of_snapshot(bytes, header, path, budget, snapshot), size);
        }
    }
    for bitmap in inside::bitmaps(bytes, header, path).unwrap_or_default().iter().take(16) {
        let spans = inside::dirty(bytes, header, path, bitmap, budget).unwrap_or_default();
        let mut end = 0;
        for span in spans {
            assert!(span.offset >= end && span.length > 0, "{span:?} after {end}");
            end = span.offset + span.length;
        }
        assert!(end <= header.virtual_size.0);
    }
}

/// A map has no gap and ends with the disk, unless it ends with a fault.
fn covers(map: impl Iterator<Item = Result<Extent, Qcow2Error>>, size: u64) {
    let mut at = 0;
    for extent in map.take(EXTENTS_MAX) {
        let Ok(extent) = extent else { return };
        assert!(extent.start == at && extent.length > 0, "{extent:?} at {at}");
        at += extent.length;
        assert!(at <= size);
    }
}

fn within_limits(header: &Header) {
    assert!(header.version == 2 || header.version == 3);
    assert!((9..=21).contains(&header.cluster_bits));
    assert!(header.refcount_order <= 6);
    assert!(u64::from(header.l1_entries) * 8 <= 32 << 20);
    assert!(header.l1_offset.is_multiple_of(header.cluster_size()));
    assert!(header.refcount_table_offset.is_multiple_of(header.cluster_size()));
    assert!(header.virtual_size.0 <= i64::MAX as u64);
    assert!(header.internal_snapshots <= 65536);
    assert!(header.unknown_extensions.len() <= 64);
    if let Some(name) = &header.backing_file {
        assert!((1..=BACKING_NAME_MAX as usize).contains(&name.len()));
        assert!(!name.as_encoded_bytes().contains(&0));
        let _ = is_protocol(name);
    }
    if let Some(format) = &header.backing_format {
        assert!(format.len() <= 15 && !format.chars().any(char::is_control));
    }
    let features = (header.incompatible, header.compatible, header.autoclear);
    assert!(!format!("{}{}{}", features.0, features.1, features.2).is_empty());
}
