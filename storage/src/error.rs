//! All that can go wrong in this crate, for those who pass it on.

use crate::chain::ChainError;
use crate::overlay::OverlayError;
use crate::qcow2::Qcow2Error;
use crate::space::SpaceError;

/// Something went wrong with storage at rest. Each module's own error says what.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be used.
    #[error(transparent)]
    Host(#[from] host::Error),
    /// An image's header has a fault.
    #[error(transparent)]
    Qcow2(#[from] Qcow2Error),
    /// A chain cannot be followed.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// An overlay cannot be made, or is not what it should be.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// There is not enough room.
    #[error(transparent)]
    Space(#[from] SpaceError),
}
