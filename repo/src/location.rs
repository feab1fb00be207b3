//! Where a repository is.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The place of a repository, as its URL says.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum RepoLocation {
    /// A directory: `file:///srv/backup`.
    Directory(PathBuf),
    /// A bucket of an S3 object store, and the prefix of every key in it: `s3://bucket/prefix`.
    S3 {
        /// The bucket.
        bucket: String,
        /// The prefix, without a slash at either end; may be empty.
        prefix: String,
    },
}

/// The text is no URL of a repository.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseRepoLocationError {
    /// The scheme is missing or not known.
    #[error("{0:?} is no URL of a repository; write file:///DIR or s3://BUCKET/PREFIX")]
    Scheme(String),
    /// A directory has to be given by its absolute path.
    #[error(
        "{0:?} does not name an absolute directory; file: URLs have three slashes, as in file:///srv/backup"
    )]
    NotAbsolute(String),
    /// The bucket's name is empty.
    #[error("{0:?} names no bucket; write s3://BUCKET/PREFIX")]
    NoBucket(String),
}

impl FromStr for RepoLocation {
    type Err = ParseRepoLocationError;

    fn from_str(text: &str) -> Result<Self, ParseRepoLocationError> {
        if let Some(path) = text.strip_prefix("file://") {
            let path = PathBuf::from(path);
            return match path.is_absolute() {
                true => Ok(Self::Directory(path)),
                false => Err(ParseRepoLocationError::NotAbsolute(text.to_owned())),
            };
        }
        let rest =
            text.strip_prefix("s3://").ok_or_else(|| ParseRepoLocationError::Scheme(text.to_owned()))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(ParseRepoLocationError::NoBucket(text.to_owned()));
        }
        Ok(Self::S3 { bucket: bucket.to_owned(), prefix: prefix.trim_matches('/').to_owned() })
    }
}

impl fmt::Display for RepoLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "file://{}", path.display()),
            Self::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Self::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
        }
    }
}

impl TryFrom<String> for RepoLocation {
    type Error = ParseRepoLocationError;

    fn try_from(text: String) -> Result<Self, ParseRepoLocationError> {
        text.parse()
    }
}

impl From<RepoLocation> for String {
    fn from(location: RepoLocation) -> Self {
        location.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_and_written() {
        for url in ["file:///srv/backup", "s3://bucket", "s3://bucket/a/b"] {
            assert_eq!(url.parse::<RepoLocation>().unwrap().to_string(), url);
        }
        assert_eq!("s3://bucket/a/".parse::<RepoLocation>().unwrap().to_string(), "s3://bucket/a");
        let fault = |text: &str| text.parse::<RepoLocation>().unwrap_err();
        assert!(matches!(fault("/srv/backup"), ParseRepoLocationError::Scheme(_)));
        assert!(matches!(fault("file://srv/backup"), ParseRepoLocationError::NotAbsolute(_)));
        assert!(matches!(fault("s3:///x"), ParseRepoLocationError::NoBucket(_)));
    }
}
