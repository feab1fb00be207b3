//! Carrying a plan out: each merge is journalled, copied by a job of QEMU's, and settled.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use agent_client::{BlockCommit, BlockNode, BlockStream, Qmp, QueryNamedBlockNodes};
use host::files;
use model::{ByteSize, ImageFormat, OperationId};
use storage::overlay::backing_name;
use storage::qcow2::Header;
use storage::{allocated, seal, space};
use vm::Machine;

use super::forest::Merge;
use super::job::{Command, Job, Shared};
use super::ledger::{InFlight, Stage, sealed};
use super::plan::DiskMerges;
use super::settle::{Became, Settler, flush};
use crate::bitmaps::Descent;
use crate::daemon::Daemon;
use crate::error::StepError;
use crate::pause::Pauser;
use crate::qemu_img;
use crate::recover::require_free;
use crate::target::{Target, Tools, observe};

/// What is done where a read or a write of a job fails: without room it waits, otherwise it ends.
const ON_ERROR: &str = "enospc";

/// One run of a plan.
pub(super) struct Run<'a> {
    pub target: &'a Target<'a>,
    pub tools: &'a Tools,
    pub operation: OperationId,
    pub settler: Settler<'a>,
    pub shared: &'a Shared<'a>,
}

impl Run<'_> {
    /// Merges one disk's layers, one after the other.
    pub async fn disk(&self, index: usize, disk: &DiskMerges) -> Result<(), StepError> {
        for (nth, merge) in disk.merges.iter().enumerate() {
            self.shared.interrupt.check()?;
            let job = job_name(self.operation, index, nth);
            let in_flight = InFlight { merge: merge.clone(), job, stage: Stage::Begun };
            self.merge(index, &in_flight).await?;
        }
        Ok(())
    }

    async fn merge(&self, disk: usize, in_flight: &InFlight) -> Result<(), StepError> {
        require_room(&in_flight.merge)?;
        self.settler.ledger.begin(in_flight.clone())?;
        let copied = match host::fault::point("merge.begun") {
            Ok(()) => self.copy(disk, in_flight).await,
            Err(fault) => Err(fault.into()),
        };
        // Whatever the job said: what is, is looked at.
        let in_flight = self.settler.ledger.in_flight(&in_flight.job).unwrap_or_else(|| in_flight.clone());
        let settled = self.settler.settle(&in_flight).await;
        copied?;
        match settled? {
            Became::Done => Ok(()),
            Became::NotDone => Err(StepError::NotMerged { job: in_flight.job }),
        }
    }

    async fn copy(&self, disk: usize, in_flight: &InFlight) -> Result<(), StepError> {
        let merge = &in_flight.merge;
        let Some(survivor) = merge.survivor() else { return Ok(()) };
        let machine = observe(self.settler.session).await?;
        let online = machine.as_ref().filter(|machine| !machine.nodes_on(survivor).is_empty());
        self.unseal(merge)?;
        host::fault::point("merge.unsealed")?;
        match (online, self.target) {
            (Some(machine), Target::Running(session)) => {
                let nodes = Nodes::of_machine(machine, merge)?;
                let pauser = Pauser { session, guard: &self.tools.guard, turn: &self.shared.turn };
                let pauser = is_of_active(merge).then_some(&pauser);
                let job = self.job(disk, in_flight, &session.qmp, &nodes, survivor, pauser)?;
                let pause = job.run().await?;
                self.pivoted(in_flight, survivor, Some((&session.qmp, &nodes.survivor))).await?;
                match pause {
                    Some(pause) => pause.end().await,
                    None => Ok(()),
                }
            }
            _ => self.copy_offline(disk, in_flight, survivor).await,
        }
    }

    /// With nothing open in the VM, or without a VM.
    async fn copy_offline(
        &self,
        disk: usize,
        in_flight: &InFlight,
        survivor: &Path,
    ) -> Result<(), StepError> {
        let merge = &in_flight.merge;
        for path in merge.files() {
            require_free(path, None)?;
        }
        let daemon = Daemon::start(&self.tools.tie, self.target, &in_flight.job).await?;
        daemon.open(uppermost_offline(merge)).await?;
        let nodes = Nodes::of_daemon(&daemon, merge).await?;
        let ran = {
            let job = self.job(disk, in_flight, &daemon.qmp, &nodes, survivor, None)?;
            job.run().await.map(drop)
        };
        let quit = daemon.quit().await;
        ran?;
        quit?;
        if let Merge::Commit { base, overlay: Some(overlay), .. } = merge {
            host::fault::point("merge.switched")?;
            return self.put_on(overlay, base).await;
        }
        self.pivoted(in_flight, survivor, None).await
    }

    /// Lets the header of `overlay` name `base`: both are free, and what it stands on reads the same.
    async fn put_on(&self, overlay: &Path, base: &Path) -> Result<(), StepError> {
        flush(base, None).await?;
        let history = self.settler.ledger.history();
        let format = sealed(&history, base).map_or(ImageFormat::Qcow2, |(format, _)| format);
        let name = backing_name(base, overlay);
        let rebase = ["rebase", "-u", "-q", "-f", "qcow2", "-F", format.driver(), "-b"].map(OsStr::new);
        let files = [name.as_os_str(), OsStr::new("--"), overlay.as_os_str()];
        qemu_img::run(rebase.into_iter().chain(files)).await
    }

    /// Makes it durable that the survivor counts, before anything writes to it.
    ///
    /// `node` is the survivor where it is open: the guest stands still, so that nobody is asked for it again.
    async fn pivoted(
        &self,
        in_flight: &InFlight,
        survivor: &Path,
        node: Option<(&Qmp, &str)>,
    ) -> Result<(), StepError> {
        if !is_of_active(&in_flight.merge) {
            return Ok(());
        }
        host::fault::point("merge.switched")?;
        flush(survivor, node).await?;
        self.settler.ledger.pivoted(&in_flight.job)?;
        Ok(host::fault::point("merge.pivoted")?)
    }

    fn job<'b>(
        &'b self,
        disk: usize,
        in_flight: &'b InFlight,
        qmp: &'b Qmp,
        nodes: &'b Nodes,
        survivor: &Path,
        pauser: Option<&'b Pauser<'b>>,
    ) -> Result<Job<'b>, StepError> {
        let command = command(&in_flight.merge, &in_flight.job, nodes, self.shared.limits.speed());
        let command = command.ok_or_else(|| StepError::OtherFile(survivor.to_owned()))?;
        let dir = files::parent(survivor).to_owned();
        Ok(Job {
            qmp,
            id: &in_flight.job,
            command,
            pauser,
            bitmaps: &nodes.bitmaps,
            dir,
            shared: self.shared,
            disk,
        })
    }

    /// Lets QEMU write to what the merge changes.
    fn unseal(&self, merge: &Merge) -> Result<(), StepError> {
        let history = self.settler.ledger.history();
        for path in merge.written() {
            if let Some((_, Some(mode))) = sealed(&history, path) {
                seal::unseal(path, mode)?;
            }
        }
        Ok(())
    }
}

/// The nodes that a job is told.
struct Nodes {
    /// The topmost node of the disk.
    root: String,
    survivor: String,
    top: Option<String>,
    below: Option<String>,
    /// Whether a layer above those that are merged is open too.
    is_inner: bool,
    /// The dirty bitmaps that go down with the uppermost of them.
    bitmaps: Descent,
}

impl Nodes {
    fn of_machine(machine: &Machine, merge: &Merge) -> Result<Self, StepError> {
        let node = |path: &Path| {
            let open = machine.has_open(path) != Some(false);
            machine.nodes_on(path).into_iter().next().filter(|_| open)
        };
        let layers = machine.disks.iter().filter_map(|disk| disk.layer());
        let survivor = merge.survivor().map(Path::to_owned).unwrap_or_default();
        let of_disk = layers.into_iter().find(|layer| {
            layer.path == survivor || layer.below.iter().any(|below| below.path.as_ref() == Some(&survivor))
        });
        let root = of_disk.and_then(|layer| layer.nodes.first().cloned());
        Self::new(merge, root, node, &machine.nodes)
    }

    async fn of_daemon(daemon: &Daemon, merge: &Merge) -> Result<Self, StepError> {
        let mut known: Vec<(PathBuf, String)> = Vec::new();
        for path in merge.files().chain(below(merge)) {
            let node = daemon.nodes_on(path).await?.into_iter().next();
            known.extend(node.map(|node| (path.to_owned(), node)));
        }
        let node = |path: &Path| known.iter().find(|(known, _)| known == path).map(|(_, node)| node.clone());
        let root = node(uppermost_offline(merge));
        let nodes = daemon.qmp.execute(&QueryNamedBlockNodes { flat: true }).await?;
        Self::new(merge, root, node, &nodes)
    }

    fn new(
        merge: &Merge,
        root: Option<String>,
        node: impl Fn(&Path) -> Option<String>,
        nodes: &[BlockNode],
    ) -> Result<Self, StepError> {
        let find = |path: &Path| node(path).ok_or_else(|| StepError::OtherFile(path.to_owned()));
        let survivor = merge.survivor().unwrap_or(Path::new(""));
        let top = match merge {
            Merge::Commit { top, .. } => Some(find(top)?),
            Merge::Stream { .. } | Merge::Remove { .. } => None,
        };
        let survivor_node = find(survivor)?;
        let of_active = top.as_ref().filter(|_| is_of_active(merge));
        Ok(Self {
            root: root.ok_or_else(|| StepError::OtherFile(survivor.to_owned()))?,
            bitmaps: of_active.map_or_else(Descent::default, |top| Descent::new(nodes, top, &survivor_node)),
            survivor: survivor_node,
            top,
            below: below(merge).map(&find).transpose()?,
            is_inner: above(merge).is_some_and(|above| find(above).is_ok()),
        })
    }
}

fn command(merge: &Merge, job: &str, nodes: &Nodes, speed: u64) -> Option<Command> {
    let (job_id, on_error) = (job.to_owned(), ON_ERROR.to_owned());
    let name = |base: &Path, overlay: &Path| backing_name(base, overlay).display().to_string();
    match merge {
        Merge::Commit { base, overlay, .. } => Some(Command::Commit(BlockCommit {
            job_id,
            device: nodes.root.clone(),
            // Named, so that a filter above it stays where it is.
            top_node: nodes.top.clone(),
            base_node: nodes.survivor.clone(),
            backing_file: overlay.as_ref().filter(|_| nodes.is_inner).map(|overlay| name(base, overlay)),
            speed,
            on_error,
            auto_finalize: !nodes.is_inner,
            auto_dismiss: false,
        })),
        Merge::Stream { into, below, .. } => Some(Command::Stream(BlockStream {
            job_id,
            device: nodes.survivor.clone(),
            base_node: nodes.below.clone(),
            backing_file: below.as_ref().map(|below| name(below, into)),
            speed,
            on_error,
            auto_finalize: false,
            // See `job`: concluded, it would be a danger to QEMU.
            auto_dismiss: true,
        })),
        Merge::Remove { .. } => None,
    }
}

/// Whether the layer goes away to which a guest writes, or which is the end of a branch.
fn is_of_active(merge: &Merge) -> bool {
    matches!(merge, Merge::Commit { overlay: None, .. })
}

/// The uppermost file that a merge touches.
fn uppermost(merge: &Merge) -> &Path {
    match merge {
        Merge::Commit { overlay: Some(overlay), .. } => overlay,
        Merge::Commit { top, .. } => top,
        Merge::Stream { into, .. } => into,
        Merge::Remove { path, .. } => path,
    }
}

/// The uppermost file that the storage daemon opens for it. Without what stands on them, layers are committed by the
/// faster job: the header of what stands on them is changed afterwards.
fn uppermost_offline(merge: &Merge) -> &Path {
    match merge {
        Merge::Commit { top, .. } => top,
        other => uppermost(other),
    }
}

/// The layer above those that are committed.
fn above(merge: &Merge) -> Option<&Path> {
    match merge {
        Merge::Commit { overlay, .. } => overlay.as_deref(),
        Merge::Stream { .. } | Merge::Remove { .. } => None,
    }
}

/// The file on which the survivor of a stream stands afterwards.
fn below(merge: &Merge) -> Option<&Path> {
    match merge {
        Merge::Stream { below, .. } => below.as_deref(),
        Merge::Commit { .. } | Merge::Remove { .. } => None,
    }
}

fn job_name(operation: OperationId, disk: usize, nth: usize) -> String {
    format!("m{}-{disk}-{nth}", operation.tag())
}

/// Makes sure that what a merge copies has room.
pub(super) fn require_room(merge: &Merge) -> Result<(), StepError> {
    let Some(survivor) = merge.survivor() else { return Ok(()) };
    Ok(space::require_for(survivor, room(merge)?)?)
}

/// What a merge may take at most: what is copied, but no more than the survivor can still grow.
pub(super) fn room(merge: &Merge) -> Result<ByteSize, StepError> {
    let Some(survivor) = merge.survivor() else { return Ok(ByteSize(0)) };
    let found = std::fs::metadata(survivor).map_err(host::Error::io("look at", survivor))?;
    let whole = Header::open(uppermost(merge)).map_or(u64::MAX, |header| header.virtual_size.0);
    // Tables take less than a hundredth, at the cluster sizes in use.
    let with_tables = |bytes: u64| bytes.saturating_add(bytes / 100).saturating_add(1 << 20);
    let grows = with_tables(whole).saturating_sub(allocated(&found).0);
    Ok(ByteSize(with_tables(merge.copied().0).min(grows)))
}
