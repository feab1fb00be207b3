//! The backup repository at rest.
//!
//! Only the public types are here so far: where a repository is.

mod location;

pub use location::{ParseRepoLocationError, RepoLocation};
