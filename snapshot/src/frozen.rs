//! A guest that may be frozen and that nobody could thaw: remembered in the journal until its agent has thawed it or
//! its QEMU has ended.
//!
//! An agent that is dead says nothing about the file systems that it froze: they stay frozen.

use std::time::Duration;

use agent_client::ChardevInfo;
use host::lock::start_time;
use model::{Name, OperationId};
use serde::{Deserialize, Serialize};
use vm::{PendingOperation, Session, State, open_agent};

use crate::create::random_bits;
use crate::error::StepError;
use crate::recover::Recovered;

/// The kind of these entries in the journal.
pub(crate) const KIND: &str = "thaw";

/// Whose guest it is: a QEMU that was started since has a guest that nobody froze.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FrozenIn {
    /// QEMU's process, where the socket tells.
    pid: Option<u32>,
    /// When it started, in clock ticks since the host did.
    started: Option<u64>,
}

impl FrozenIn {
    fn of(session: &Session) -> Self {
        let pid = session.qmp.peer_pid();
        Self { pid, started: pid.and_then(start_time) }
    }
}

/// How a thaw went.
pub(crate) enum Thaw {
    /// The agent confirmed it.
    Confirmed,
    /// There is no agent that could.
    NoAgent {
        /// What is known about it.
        why: String,
    },
}

/// Thaws, whatever the agent believes: a guard that died with its parent leaves a frozen guest behind.
///
/// `wait` is how long it waits for whoever holds the agent's socket.
///
/// # Errors
/// Why an agent that is there did not.
pub(crate) async fn thaw(
    session: &Session,
    chardevs: &[ChardevInfo],
    wait: Option<Duration>,
) -> Result<Thaw, String> {
    let Session { vm, definition, timeout, .. } = session;
    match open_agent(vm, definition, chardevs, wait, *timeout).await {
        Ok(agent) => match agent.thaw().await {
            Ok(_) => Ok(Thaw::Confirmed),
            Err(fault) => Err(fault.to_string()),
        },
        Err(vm::Error::NoAgent { source: None, why, .. }) => Ok(Thaw::NoAgent { why }),
        Err(fault) => Err(fault.to_string()),
    }
}

/// Remembers that the guest behind `session` may be frozen.
///
/// # Errors
/// [`vm::Error::State`].
pub(crate) fn remember(session: &Session, state: &State) -> Result<(), vm::Error> {
    if state.pending(Some(&session.vm))?.iter().any(|pending| pending.kind == KIND) {
        return Ok(());
    }
    let id = OperationId::from_bits(random_bits());
    state.begin(id, &session.vm, KIND, &FrozenIn::of(session)).map(drop)
}

/// Thaws a guest that is remembered as perhaps frozen. One that still cannot be thawed stays remembered, and is no
/// reason to do nothing else: a snapshot of it loses nothing.
pub(crate) async fn settle_pending(
    session: Option<&Session>,
    pending: &PendingOperation,
    state: &State,
) -> Result<Recovered, StepError> {
    let vm = pending.vm.clone();
    let frozen_in: FrozenIn = pending.plan()?;
    let Some(session) = session.filter(|session| frozen_in == FrozenIn::of(session)) else {
        forget(pending, state)?;
        return Ok(Recovered::Thawed { vm });
    };
    let machine = session.observe().await?;
    // A guard that still tries holds the socket, and other work need not wait for it.
    match thaw(session, &machine.chardevs, session.wait).await {
        Ok(Thaw::Confirmed) => {
            forget(pending, state)?;
            Ok(Recovered::Thawed { vm })
        }
        Ok(Thaw::NoAgent { why }) | Err(why) => Ok(Recovered::MayBeFrozen { vm, why }),
    }
}

/// Forgets that the guest of `vm` may be frozen: its agent has confirmed a thaw.
///
/// # Errors
/// [`vm::Error::State`].
pub fn forget_frozen(vm: &Name, state: &State) -> Result<(), vm::Error> {
    for pending in state.pending(Some(vm))?.iter().filter(|pending| pending.kind == KIND) {
        forget(pending, state)?;
    }
    Ok(())
}

/// Forgets it: the guest is thawed, or has ended.
fn forget(pending: &PendingOperation, state: &State) -> Result<(), vm::Error> {
    state.resume(pending.id)?.undone()
}
