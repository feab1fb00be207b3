//! The VM whose layers an operation changes, and how this executable is started again for that.

use std::time::Duration;

use host::tied::Tie;
use model::Name;
use vm::{Machine, Paths, Session};

use crate::error::StepError;
use crate::point::GuardProgram;

/// A VM whose layers are to be changed; the caller holds its lock.
#[derive(Debug)]
pub enum Target<'a> {
    /// Its QEMU runs.
    Running(&'a Session),
    /// It does not.
    Stopped {
        /// The VM.
        vm: &'a Name,
        /// Where things are.
        paths: &'a Paths,
        /// How long a command of the storage daemon's may take.
        timeout: Duration,
    },
}

/// How this executable is started again for what must not depend on its life.
#[derive(Clone, Debug)]
pub struct Tools {
    /// As the guard that lets a held guest go on.
    pub guard: GuardProgram,
    /// As the storage daemon that ends with it.
    pub tie: Tie,
}

impl Target<'_> {
    /// The VM.
    pub fn vm(&self) -> &Name {
        match self {
            Self::Running(session) => &session.vm,
            Self::Stopped { vm, .. } => vm,
        }
    }

    pub(crate) fn paths(&self) -> &Paths {
        match self {
            Self::Running(session) => &session.paths,
            Self::Stopped { paths, .. } => paths,
        }
    }

    pub(crate) fn timeout(&self) -> Duration {
        match self {
            Self::Running(session) => session.timeout,
            Self::Stopped { timeout, .. } => *timeout,
        }
    }

    /// Its monitor, if it runs.
    pub(crate) fn session(&self) -> Option<&Session> {
        match self {
            Self::Running(session) => Some(session),
            Self::Stopped { .. } => None,
        }
    }
}

/// What QEMU shows, if the VM runs.
pub(crate) async fn observe(session: Option<&Session>) -> Result<Option<Machine>, StepError> {
    match session {
        Some(session) => Ok(Some(session.observe().await?)),
        None => Ok(None),
    }
}
