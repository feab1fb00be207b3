//! What became of a merge whose job has ended, however it ended: looked at, and brought to its end.
//!
//! Where the graph changed, the rest is done: the survivor is made durable, the catalogue changed, the files
//! removed. Where it did not, nothing is lost: what was copied is hidden by what was copied from.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use agent_client::{HumanMonitorCommand, Qmp, printable};
use model::ImageFormat;
use storage::chain::Chain;
use storage::overlay::{make_durable, remove_if_ours};
use storage::{Inode, seal};
use vm::{Machine, Session};

use super::forest::Merge;
use super::ledger::{InFlight, Ledger, Stage, sealed};
use crate::aside;
use crate::error::StepError;
use crate::jobs::close_nodes;
use crate::target::observe;
use crate::view::policy;

/// Most of what QEMU prints that is taken up in an error.
const MAX_SAID: usize = 200;

/// Brings merges to their end.
pub(super) struct Settler<'a> {
    /// The VM's monitor, if it runs.
    pub session: Option<&'a Session>,
    pub ledger: &'a Ledger<'a>,
}

impl Settler<'_> {
    /// Finds out whether the merge is done, and does what is left to be done in either case.
    ///
    /// # Errors
    /// Nothing is lost; the journal knows of it, and this can be tried again.
    pub async fn settle(&self, in_flight: &InFlight) -> Result<Became, StepError> {
        let machine = observe(self.session).await?;
        let machine = machine.as_ref();
        if let Stage::Merged { remove } = &in_flight.stage {
            self.clean(in_flight, remove, machine).await?;
            return Ok(Became::Done);
        }
        let became = self.became(&in_flight.merge, in_flight.stage == Stage::Pivoted, machine)?;
        match became {
            Became::Done => self.finish(in_flight, machine).await?,
            Became::NotDone => {
                self.reseal(&in_flight.merge);
                self.ledger.broken_off(&in_flight.job, &in_flight.merge)?;
            }
        }
        Ok(became)
    }

    fn became(&self, merge: &Merge, pivoted: bool, machine: Option<&Machine>) -> Result<Became, StepError> {
        let done = match merge {
            Merge::Remove { .. } => true,
            Merge::Commit { overlay: Some(overlay), base, .. } => {
                self.backing(overlay)?.as_ref() == Some(base)
            }
            Merge::Stream { into, below, .. } => self.backing(into)? == *below,
            // No header tells this: where the VM runs, it does; elsewhere the journal.
            Merge::Commit { base, top, .. } => {
                let runs_on = |path: &Path| machine.is_some_and(|machine| machine.runs_on(path));
                runs_on(base) || (pivoted && !runs_on(top))
            }
        };
        Ok(if done { Became::Done } else { Became::NotDone })
    }

    /// The file on which the image at `path` stands, as its header says.
    fn backing(&self, path: &Path) -> Result<Option<PathBuf>, StepError> {
        let policy = policy(&self.ledger.history());
        let chain = Chain::open(path, ImageFormat::Qcow2, &policy)?;
        Ok(chain.active().backing.as_ref().map(|backing| backing.path.clone()))
    }

    async fn finish(&self, in_flight: &InFlight, machine: Option<&Machine>) -> Result<(), StepError> {
        let merge = &in_flight.merge;
        // A pivot was ticked off behind its flush.
        if let Some(survivor) = merge.survivor().filter(|_| in_flight.stage != Stage::Pivoted) {
            let node = machine.and_then(|machine| machine.nodes_on(survivor).into_iter().next());
            let qmp = self.session.map(|session| &session.qmp);
            flush(survivor, qmp.zip(node.as_deref())).await?;
        }
        host::fault::point("merge.flushed")?;
        let remove = identify(merge.removed())?;
        self.ledger.merged(&in_flight.job, merge, remove.clone())?;
        host::fault::point("merge.entered")?;
        self.clean(in_flight, &remove, machine).await
    }

    /// Closes and removes what is not needed any more, and seals what is frozen. The graph is as in `machine`.
    async fn clean(
        &self,
        in_flight: &InFlight,
        remove: &[(PathBuf, Inode)],
        machine: Option<&Machine>,
    ) -> Result<(), StepError> {
        if let (Some(session), Some(machine)) = (self.session, machine) {
            close(session, machine, &in_flight.merge).await?;
        }
        host::fault::point("merge.closed")?;
        for (path, inode) in remove {
            remove_layer(path, *inode)?;
        }
        host::fault::point("merge.removed")?;
        self.reseal(&in_flight.merge);
        Ok(self.ledger.over(&in_flight.job, &in_flight.merge)?)
    }

    /// Seals those layers of the merge that snapshots hold.
    fn reseal(&self, merge: &Merge) {
        let history = self.ledger.history();
        for path in merge.written() {
            if sealed(&history, path).is_some()
                && path.exists()
                && let Err(fault) = seal::seal(path)
            {
                tracing::warn!("{} is frozen and could not be made read-only: {fault}", path.display());
            }
        }
    }
}

/// Writes back what QEMU holds of the layer in its memory, and makes it durable: what it was copied from is removed
/// next. `node` is the layer's where a QEMU has it open.
///
/// Seen on 7.2 and 10.0: after a stream into an active layer, its tables are in QEMU's cache alone.
pub(super) async fn flush(path: &Path, node: Option<(&Qmp, &str)>) -> Result<(), StepError> {
    if let Some((qmp, node)) = node {
        let said =
            qmp.execute(&HumanMonitorCommand { command_line: format!("qemu-io {node} flush") }).await?;
        // This monitor has no other way to say that it failed.
        if !said.trim().is_empty() {
            let said = printable(said.trim(), MAX_SAID);
            return Err(StepError::NotFlushed { path: path.to_owned(), said });
        }
    }
    Ok(make_durable(path)?)
}

/// Closes the nodes of layers that no disk stands on any more.
///
/// # Errors
/// [`StepError::StillOpen`] if a file that is to be removed is in use all the same.
async fn close(session: &Session, machine: &Machine, merge: &Merge) -> Result<(), StepError> {
    let unused = merge.gone().iter().rev().flat_map(|path| machine.nodes_on(path));
    close_nodes(&session.qmp, unused).await?;
    let machine = session.observe().await?;
    let open = |path: &&PathBuf| machine.has_open(path) == Some(true) || !machine.nodes_on(path).is_empty();
    match merge.removed().iter().find(open) {
        Some(path) => Err(StepError::StillOpen { path: path.clone() }),
        None => Ok(()),
    }
}

/// Whether a merge was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Became {
    Done,
    NotDone,
}

fn identify(paths: &[PathBuf]) -> Result<Vec<(PathBuf, Inode)>, StepError> {
    let mut identified = Vec::new();
    for path in paths {
        match std::fs::symlink_metadata(path) {
            Ok(found) => identified.push((path.clone(), Inode::of(&found))),
            Err(fault) if fault.kind() == std::io::ErrorKind::NotFound => {}
            Err(fault) => return Err(host::Error::io("look at", path)(fault).into()),
        }
    }
    Ok(identified)
}

fn remove_layer(path: &Path, inode: Inode) -> Result<(), StepError> {
    if aside::is_device(path) {
        return aside::remove_device(path);
    }
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) if Inode::of(&found) == inode => found,
        // Removed before, or replaced by somebody, whose file it is then.
        _ => return Ok(()),
    };
    seal::unseal(path, found.permissions().mode() & 0o7777)?;
    remove_if_ours(path, inode)?;
    Ok(())
}
