//! What the fuzzer does with its bytes, shared with the property tests in `storage/tests/images`.

use std::path::Path;

use storage::chain::is_protocol;
use storage::qcow2::{BACKING_NAME_MAX, Header, is_pristine};

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
            assert!(header.internal_snapshots == 0 || !matches!(pristine, Ok(true)));
        }
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
