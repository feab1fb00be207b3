//! The few doors to the host: what the house asks of the kernel is asked here.
//!
//! - [`files`]: files that are whole or not there, after a crash too
//! - [`lock`]: locks between processes that cannot go stale
//! - [`open_files`]: who has a file open
//! - [`program`]: running a program to its end
//! - [`watch`]: whether long work is to end, and how far it is
//! - [`tied`]: programs that do not outlive the one that started them
//! - [`fault`]: named points at which a test makes the tool die
//!
//! Nothing here knows what it is used for.

mod error;
pub mod fault;
pub mod files;
pub mod lock;
pub mod open_files;
pub mod program;
pub mod tied;
pub mod watch;

pub use error::Error;
