//! What a pool is: a place that holds volumes, of one of several kinds.
//!
//! Here are the kinds' names and the words for what a kind can do. A kind itself is one file that parses
//! its own options and does its own work.

use std::fmt;
use std::str::FromStr;

use model::ImageFormat;
use serde::{Deserialize, Serialize};

/// A kind of pool, as `snapctl pool define NAME KIND` and the definition files name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PoolKind {
    /// A directory of image files, on whatever file system.
    Dir,
    /// Thin logical volumes in an LVM thin pool.
    LvmThin,
    /// Images in a Ceph pool.
    Rbd,
}

/// The text is the name of no kind of pool.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no kind of pool ({})", all_names())]
pub struct ParsePoolKindError {
    /// The text.
    pub text: String,
}

/// What the volumes of one pool can do, found out from the pool itself, not only from its kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// A new volume takes space only where it is written to.
    pub thin: bool,
    /// The pool can take a point in time of a volume by itself.
    pub snapshot: bool,
    /// A writable copy of a volume shares its data with it.
    pub clone: bool,
    /// A volume can grow while it is in use.
    pub resize: bool,
    /// Files in the pool can share extents (`FICLONE`).
    pub reflink: bool,
    /// Formats that a volume can have; the first is used where the user names none.
    pub formats: Vec<ImageFormat>,
    /// The volumes are on another machine: a lock on this one does not keep others out.
    pub remote: bool,
}

impl PoolKind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Dir, Self::LvmThin, Self::Rbd];

    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Dir => "dir",
            Self::LvmThin => "lvm-thin",
            Self::Rbd => "rbd",
        }
    }
}

impl fmt::Display for PoolKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for PoolKind {
    type Err = ParsePoolKindError;

    fn from_str(text: &str) -> Result<Self, ParsePoolKindError> {
        let kind = Self::ALL.into_iter().find(|kind| kind.as_str() == text);
        kind.ok_or_else(|| ParsePoolKindError { text: text.to_owned() })
    }
}

fn all_names() -> String {
    PoolKind::ALL.map(PoolKind::as_str).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for kind in PoolKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        let error = "lvm".parse::<PoolKind>().unwrap_err();
        assert_eq!(error.to_string(), "\"lvm\" is no kind of pool (dir, lvm-thin, rbd)");
    }
}
