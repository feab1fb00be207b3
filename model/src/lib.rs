//! The words of the house as types: names, sizes, formats, snapshots and outcomes.
//!
//! Nothing here does I/O or knows another crate of the workspace. A type here means the same on every
//! floor: what `snapshot` records, `vm` stores and `cli` prints is one `SnapshotRecord`.

mod disk;
mod fingerprint;
mod history;
mod id;
mod internal;
mod memory;
mod name;
mod plan;
mod platform;
mod size;
mod snapshot;

pub use disk::{DiskName, ImageFormat, ParseImageFormatError};
pub use fingerprint::{Compared, Digest, Fingerprint};
pub use history::{Head, History};
pub use id::{OperationId, ParseIdError, SnapshotId};
pub use internal::{InternalDisk, InternalRecord};
pub use memory::{DeviceRecord, MemoryLayout, MemoryMethod, MemoryRecord};
pub use name::{MAX_NAME_LEN, Name, ParseNameError};
pub use plan::PlannedStep;
pub use platform::{PlatformFile, PlatformKind};
pub use size::{ByteSize, ParseSizeError};
pub use snapshot::{Consistency, CopyMethod, FreezeReport, LayerRecord, MAX_LABELS, Quiesce, SnapshotRecord};
