//! What became of a merge whose job has ended, however it ended: looked at, and brought to its end.
//!
//! Where the graph changed, the rest is done: the survivor is made durable, the catalogue changed, the files
//! removed. Where it did not, nothing is lost: what was copied is hidden by what was copied from.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use agent_client::{BlockdevDel, HumanMonitorCommand, printable};
use host::files;
use model::ImageFormat;
use storage::chain::Chain;
use storage::overlay::{RemovedOverlay, remove_if_ours};
use storage::{Inode, seal};
use vm::{Machine, Session};

use super::forest::Merge;
use super::ledger::{InFlight, Ledger, Stage, sealed};
use crate::error::StepError;
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
        if let Stage::Merged { remove } = &in_flight.stage {
            self.clean(in_flight, remove).await?;
            return Ok(Became::Done);
        }
        let machine = self.observe().await?;
        let became = self.became(&in_flight.merge, in_flight.stage == Stage::Pivoted, machine.as_ref())?;
        match became {
            Became::Done => self.finish(in_flight).await?,
            Became::NotDone => {
                self.reseal(&in_flight.merge);
                self.ledger.broken_off(&in_flight.job, &in_flight.merge)?;
            }
        }
        Ok(became)
    }

    /// What QEMU shows, if the VM runs.
    pub async fn observe(&self) -> Result<Option<Machine>, StepError> {
        let Some(session) = self.session else { return Ok(None) };
        Ok(Some(session.observe().await?))
    }

    /// Writes back what QEMU holds of the layer in its memory, and makes it durable: what it was copied from is
    /// removed next.
    ///
    /// Seen on 7.2 and 10.0: after a stream into an active layer, its tables are in QEMU's cache alone.
    pub async fn flush(&self, path: &Path) -> Result<(), StepError> {
        if let (Some(session), Some(machine)) = (self.session, self.observe().await?)
            && let Some(node) = machine.nodes_on(path).first()
        {
            let command = HumanMonitorCommand { command_line: format!("qemu-io {node} flush") };
            let said = session.qmp.execute(&command).await?;
            // This monitor has no other way to say that it failed.
            if !said.trim().is_empty() {
                let said = printable(said.trim(), MAX_SAID);
                return Err(StepError::NotFlushed { path: path.to_owned(), said });
            }
        }
        files::sync_file(path)?;
        Ok(files::sync_dir(files::parent(path))?)
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
                let is_active = |path: &Path| {
                    let disks = machine.iter().flat_map(|machine| &machine.disks);
                    disks.filter_map(|disk| disk.layer()).any(|layer| layer.path == path)
                };
                is_active(base) || (pivoted && !is_active(top))
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

    async fn finish(&self, in_flight: &InFlight) -> Result<(), StepError> {
        let merge = &in_flight.merge;
        if let Some(survivor) = merge.survivor() {
            self.flush(survivor).await?;
        }
        host::fault::point("merge.flushed")?;
        let remove = identify(merge.removed())?;
        self.ledger.merged(&in_flight.job, merge, remove.clone())?;
        host::fault::point("merge.entered")?;
        self.clean(in_flight, &remove).await
    }

    /// Closes and removes what is not needed any more, and seals what is frozen.
    async fn clean(&self, in_flight: &InFlight, remove: &[(PathBuf, Inode)]) -> Result<(), StepError> {
        self.close(&in_flight.merge).await?;
        host::fault::point("merge.closed")?;
        for (path, inode) in remove {
            remove_layer(path, *inode)?;
        }
        host::fault::point("merge.removed")?;
        self.reseal(&in_flight.merge);
        Ok(self.ledger.over(&in_flight.job)?)
    }

    /// Closes the nodes of layers that no disk stands on any more. QEMU keeps those that a user named.
    async fn close(&self, merge: &Merge) -> Result<(), StepError> {
        let (Some(session), Some(machine)) = (self.session, self.observe().await?) else { return Ok(()) };
        let unused = match merge {
            Merge::Commit { gone, .. } | Merge::Stream { gone, .. } => gone.as_slice(),
            Merge::Remove { path, .. } => std::slice::from_ref(path),
        };
        // The uppermost first: it holds those below.
        for node_name in unused.iter().rev().flat_map(|path| machine.nodes_on(path)) {
            match session.qmp.execute(&BlockdevDel { node_name }).await {
                // It went with another, or is in use: then the file is still open, which is looked at below.
                Err(fault) if !fault.is_refusal() => return Err(fault.into()),
                _ => {}
            }
        }
        let Some(machine) = self.observe().await? else { return Ok(()) };
        let open =
            |path: &&PathBuf| machine.has_open(path) == Some(true) || !machine.nodes_on(path).is_empty();
        match merge.removed().iter().find(open) {
            Some(path) => Err(StepError::StillOpen { path: path.clone() }),
            None => Ok(()),
        }
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
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) if Inode::of(&found) == inode => found,
        // Removed before, or replaced by somebody, whose file it is then.
        _ => return Ok(()),
    };
    seal::unseal(path, found.permissions().mode() & 0o7777)?;
    match remove_if_ours(path, inode)? {
        RemovedOverlay::Removed | RemovedOverlay::AlreadyGone | RemovedOverlay::NotOurs(_) => Ok(()),
    }
}
