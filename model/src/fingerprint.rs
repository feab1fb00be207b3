//! What a frozen layer was when it was sealed, so that a change behind our back shows.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::ByteSize;

/// A BLAKE3 hash, written as 64 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Digest(pub String);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One layer, as it was when it was sealed, or when layers were merged into it last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Its inode number. That of the device is not kept: it may change with each start of the host.
    pub inode: u64,
    /// Its length in bytes.
    pub size: ByteSize,
    /// When it was written to last, as its file system says.
    pub modified: Timestamp,
    /// Of a qcow2 image the header, the L1 table and the refcount table; of another one how it begins.
    pub tables: Digest,
    /// All of it. It is known once `snapctl check --deep` has read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Digest>,
}

/// What became of a layer since its fingerprint was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// It is the same in all that is known.
    Same,
    /// It holds the same, and is another file, or was written to with what was there already.
    SameContent,
    /// It looks the same, is another file, and nobody had read its content before.
    OtherFile,
    /// It was changed.
    Changed,
}

impl Fingerprint {
    /// Compares what is remembered with what is `found` now, its content included if that is known.
    pub fn compare(&self, found: &Self) -> Compared {
        let looks_same =
            (self.size, self.modified, &self.tables) == (found.size, found.modified, &found.tables);
        match (&self.content, &found.content) {
            (Some(was), Some(is)) if was != is => Compared::Changed,
            _ if looks_same && self.inode == found.inode => Compared::Same,
            (Some(_), Some(_)) => Compared::SameContent,
            _ if looks_same => Compared::OtherFile,
            _ => Compared::Changed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(content: Option<&str>) -> Fingerprint {
        Fingerprint {
            inode: 7,
            size: ByteSize(65536),
            modified: Timestamp::UNIX_EPOCH,
            tables: Digest("aa".into()),
            content: content.map(|text| Digest(text.into())),
        }
    }

    #[test]
    fn content_decides_where_it_is_known_and_looks_where_it_is_not() {
        let moved = |content| Fingerprint { inode: 8, ..known(content) };
        let touched = |content| Fingerprint { modified: Timestamp::MAX, ..known(content) };
        let cases = [
            (known(None), known(Some("a")), Compared::Same),
            (known(Some("a")), known(Some("a")), Compared::Same),
            (known(Some("a")), known(Some("b")), Compared::Changed),
            (known(Some("a")), moved(Some("a")), Compared::SameContent),
            (known(Some("a")), touched(Some("a")), Compared::SameContent),
            (known(None), moved(Some("a")), Compared::OtherFile),
            (known(None), touched(Some("a")), Compared::Changed),
            (known(None), Fingerprint { tables: Digest("bb".into()), ..known(None) }, Compared::Changed),
            (known(None), Fingerprint { size: ByteSize(1), ..known(None) }, Compared::Changed),
        ];
        for (was, is, expected) in cases {
            assert_eq!(was.compare(&is), expected, "{was:?} {is:?}");
        }
    }
}
