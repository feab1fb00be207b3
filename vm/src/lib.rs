//! Registered VMs: where they are, what they look like now, and what snapctl remembers of them.
//!
//! - [`Paths`]: where definitions, state and locks are
//! - [`Registry`]: the definitions in `vms/NAME.toml`, `pools/NAME.toml` and `networks/NAME.toml`
//! - [`pools`]: defined pools under their locks, and who claims a volume
//! - [`networks`]: defined networks under their lock
//! - [`State`]: the catalogue of snapshots and the journal of operations, one SQLite file
//! - [`Session`]: one VM under its lock, with its monitor connected
//! - [`platform`]: what a VM keeps beside its disks: firmware variables, TPM
//! - [`disks`]: a VM's disks as QEMU shows them, by every name that a user may know

mod capabilities;
mod definition;
pub mod disks;
mod error;
mod exposure;
pub mod networks;
mod paths;
pub mod platform;
pub mod pools;
mod session;
mod state;

pub use capabilities::{FEATURES, Feature, require_features};
pub use definition::{Added, Definition, DiskAlias, Registry, VmDefinition, read_definition};
pub use error::Error;
pub use exposure::is_open_to_all;
pub use paths::Paths;
pub use session::{DEFAULT_TIMEOUT, Machine, Session, lock, observe, open_agent, open_monitor};
pub use state::{Operation, PendingOperation, State};
