//! Storage at rest: image files, the chains they form, and the places they lie in.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`qcow2`] | reads a qcow2 image that nobody vouches for |
//! | [`map`] | what a guest reads through a chain, and from which layer |
//! | [`chain`] | follows and judges a chain of files, finds the overlays of a base |
//! | [`compress`] | compresses a file durably, and reads it back |
//! | [`overlay`] | makes, verifies and removes overlay files |
//! | [`publish`] | puts files in their place at once |
//! | [`seal`] | keeps a frozen layer from being written to |
//! | [`fingerprint`] | tells a layer that was changed from one that was not |
//! | [`space`] | asks for free space before anything is begun |
//! | [`filesystem`] | tells what the file system below an image can do |
//! | [`pool`] | places for volumes, each kind in a file of its own |
//! | [`volume`] | makes, copies, converts and removes volumes |
//! | [`reflink`] | copies that share their data with the original |
//! | [`thin`] | thin volumes of LVM as copies of each other |
//! | [`vmdk`] | reads a VMDK descriptor that nobody vouches for |
//!
//! Nothing here talks to QEMU or knows a VM. What an image says about itself is a claim: no format is ever
//! probed, no name followed that the caller did not allow.

pub mod chain;
pub mod compress;
mod error;
mod file;
pub mod filesystem;
pub mod fingerprint;
pub mod map;
pub mod overlay;
pub mod pool;
pub mod publish;
pub mod qcow2;
pub mod reflink;
pub mod seal;
pub mod space;
pub mod thin;
pub mod vmdk;
pub mod volume;

pub use error::Error;
pub use file::{Inode, allocated, real_path};
pub use pool::PoolError;
use pool::refuse_open;
