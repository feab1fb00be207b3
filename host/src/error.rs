//! What can go wrong at a door to the host.

use std::io;
use std::path::{Path, PathBuf};

/// A call to the host failed. Every variant names what was tried and on what.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call on a path failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as the rest of "cannot …".
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file is longer than anything that snapctl would have written there.
    #[error("{} is longer than {limit} bytes; it was not read", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
    },
}

impl Error {
    /// An [`Error::Io`], as [`Result::map_err`] wants it: `.map_err(Error::io("open", path))`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    /// What it was tried on.
    pub fn path(&self) -> &Path {
        match self {
            Self::Io { path, .. } | Self::TooLong { path, .. } => path,
        }
    }

    /// What kind of answer the kernel gave, if one is behind it.
    pub fn kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Io { source, .. } => Some(source.kind()),
            Self::TooLong { .. } => None,
        }
    }
}
