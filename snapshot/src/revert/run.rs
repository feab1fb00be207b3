//! Carrying a revert out: prepare, switch, look, enter, reset. Recovery goes the same way from where it stopped.

use std::path::Path;
use std::time::Duration;

use agent_client::{BlockdevMirror, Cont, JobComplete, JobDismiss, Qmp, QueryStatus, SetAction, SystemReset};
use host::files;
use jiff::Timestamp;
use model::CopyMethod;
use storage::Inode;
use storage::chain::Chain;
use tokio::time::timeout;
use vm::{Operation, Session, State};

use super::plan::{RevertDisk, RevertPlan};
use crate::aside;
use crate::create::{Interrupt, Warning, fingerprint_of, seal_layer};
use crate::daemon::Daemon;
use crate::error::StepError;
use crate::jobs::{CONCLUDED, close_nodes, end, tell, wait_for};
use crate::overlays::{self, Backing};
use crate::pause::Pause;
use crate::plan::DiskPlan;
use crate::platform;
use crate::target::{Target, Tools, observe};
use crate::view::policy;

/// Ticked off when the guest runs again.
pub(super) const RESUMED: &str = "revert.resumed";
/// Ticked off when firmware variables and TPM state are as they were.
pub(super) const PUT_BACK: &str = "revert.platform";
/// How long a switch or a reset may take: nothing is copied.
const LIMIT: Duration = Duration::from_secs(30);

/// One revert.
pub(super) struct Run<'a> {
    pub plan: &'a RevertPlan,
    /// The VM's monitor, if it runs.
    pub session: Option<&'a Session>,
    pub state: &'a State,
    /// Firmware variables and TPM state are put back already: the VM may have changed them since.
    pub is_put_back: bool,
}

impl Run<'_> {
    /// Makes the overlays ready. On an error, the files that were made are in `made`.
    pub async fn prepare(
        &self,
        target: &Target<'_>,
        tools: &Tools,
        operation: &Operation<'_>,
        made: &mut Vec<Inode>,
        interrupt: &Interrupt,
    ) -> Result<(), StepError> {
        let step = |name: &str| {
            host::fault::point(name)?;
            interrupt.check()
        };
        step("revert.begun")?;
        let disks = self.overlays();
        overlays::require_room(&disks)?;
        for disk in &self.plan.disks {
            // The base is sealed; the layer that the guest writes to has the owner and mode that are meant.
            let method = disk.renewed.unwrap_or(CopyMethod::Reflink);
            made.push(aside::place(&disk.new.overlay, &disk.old, method)?);
        }
        step("revert.files")?;
        operation.note("revert.files", &made)?;
        let tag = self.plan.operation.tag();
        for disk in &self.plan.disks {
            if let Some(method) = disk.renewed {
                aside::renew(&disk.new.base, &disk.new.overlay, method, &tag)?;
            }
        }
        match target {
            Target::Running(session) => {
                overlays::open(&session.qmp, &disks, Backing::Chain).await?;
                let renewed = self.plan.disks.iter().filter(|disk| disk.renewed.is_some());
                overlays::open_renewed(&session.qmp, renewed.map(|disk| &disk.new)).await?;
            }
            Target::Stopped { .. } if disks.is_empty() => {}
            Target::Stopped { .. } => {
                let name = format!("r{}", self.plan.operation.tag());
                let daemon = Daemon::start(&tools.tie, target, &name).await?;
                let opened = overlays::open(&daemon.qmp, &disks, Backing::Chain).await;
                let quit = daemon.quit().await;
                opened?;
                quit?;
            }
        }
        step("revert.opened")?;
        overlays::verify(&disks)?;
        operation.tick("revert.prepared")?;
        step("revert.prepared")
    }

    /// Takes back what [`Run::prepare`] did. Returns what could not be taken back.
    pub async fn undo(&self, made: &[Inode]) -> Vec<String> {
        let disks = self.new_disks();
        let left = match self.session {
            Some(session) => overlays::close(&session.qmp, &disks).await,
            None => Vec::new(),
        };
        // What QEMU still has open stays where it is.
        if left.is_empty() { overlays::remove_noted_or_empty(&disks, made) } else { left }
    }

    /// Switches what is not switched yet, and does all that follows. What is done already stays as it is.
    pub async fn advance(
        &self,
        operation: Operation<'_>,
        pause: Option<Pause<'_>>,
        warnings: &mut Vec<Warning>,
    ) -> Result<(), StepError> {
        if let Some(session) = self.session {
            self.switch(session).await?;
        }
        host::fault::point("revert.switched")?;
        let mut history = self.state.history(Some(&self.plan.vm))?;
        let is_entered = self.plan.disks.iter().all(|disk| history.head(&disk.new.overlay).is_some());
        if !is_entered {
            let mut modes = Vec::new();
            for disk in self.plan.disks.iter().filter(|_| self.plan.branch.is_some()) {
                modes.push((&disk.old, seal_layer(&disk.old, &disk.new.overlay, warnings)));
            }
            host::fault::point("revert.sealed")?;
            if self.plan.branch.is_some() {
                platform::copy(&self.plan.platform_now)?;
            }
            let mode = |path: &Path| modes.iter().find(|(old, _)| *old == path).and_then(|(_, mode)| *mode);
            self.plan.enter(&mut history, Timestamp::now(), mode);
            operation.rewrite("revert.entered", &(), &self.plan.vm, &history)?;
        }
        host::fault::point("revert.entered")?;
        if self.session.is_none() && !self.is_put_back {
            platform::put_back(&self.plan.platform)?;
            operation.tick(PUT_BACK)?;
        }
        if let Some(session) = self.session {
            self.resume(session, pause).await?;
            operation.tick(RESUMED)?;
            host::fault::point(RESUMED)?;
            self.close(session).await?;
        }
        host::fault::point("revert.closed")?;
        if self.plan.branch.is_none() {
            self.remove_old().await?;
        }
        host::fault::point("revert.removed")?;
        // QEMU writes to what it has open until it is closed.
        for disk in self.plan.disks.iter().filter(|_| self.plan.branch.is_some()) {
            if let Some(fingerprint) = fingerprint_of(&disk.old, disk.old_format) {
                history.note_fingerprint(&disk.old, &fingerprint);
            }
        }
        Ok(operation.finish(&self.plan.vm, &history)?)
    }

    /// Lets the device of each disk use the new overlay. Nothing is copied, since nothing is written meanwhile.
    async fn switch(&self, session: &Session) -> Result<(), StepError> {
        let machine = session.observe().await?;
        for (index, disk) in self.plan.disks.iter().enumerate() {
            if !machine.runs_on(&disk.new.overlay) {
                let job = format!("{}m", disk.new.overlay_node);
                switch_one(&session.qmp, &job, disk).await?;
            }
            if index == 0 {
                host::fault::point("revert.pivoted")?;
            }
        }
        let machine = session.observe().await?;
        match self.plan.disks.iter().find(|disk| !machine.runs_on(&disk.new.overlay)) {
            None => Ok(()),
            Some(disk) => Err(StepError::NotSwitched {
                disk: disk.new.disk.to_string(),
                overlay: disk.new.overlay.clone(),
            }),
        }
    }

    /// Resets a guest that has not run since its disks were switched, and lets it run.
    async fn resume(&self, session: &Session, pause: Option<Pause<'_>>) -> Result<(), StepError> {
        let qmp = &session.qmp;
        // One that runs was reset before: that comes first.
        if qmp.execute(&QueryStatus {}).await?.running {
            return Ok(());
        }
        self.reset(qmp).await?;
        host::fault::point("revert.reset")?;
        match pause {
            Some(pause) => pause.end().await,
            None if self.plan.runs => tell(qmp, &Cont {}).await,
            None => Ok(()),
        }
    }

    /// A QEMU that was started with `-no-reboot` takes a reset for its end, unless it is told otherwise.
    async fn reset(&self, qmp: &Qmp) -> Result<(), StepError> {
        if self.plan.ends_on_reset {
            tell(qmp, &SetAction { reboot: "reset".into() }).await?;
        }
        let mut events = qmp.events();
        tell(qmp, &SystemReset {}).await?;
        let seen = async {
            while let Ok(event) = events.recv().await {
                if event.name == "RESET" {
                    return true;
                }
            }
            false
        };
        let was_reset = timeout(LIMIT, seen).await.unwrap_or(false);
        if self.plan.ends_on_reset {
            tell(qmp, &SetAction { reboot: "shutdown".into() }).await?;
        }
        match was_reset {
            true => Ok(()),
            false => Err(StepError::NotReset { after: LIMIT }),
        }
    }

    /// Closes the nodes of the old chains.
    async fn close(&self, session: &Session) -> Result<(), StepError> {
        let machine = session.observe().await?;
        let policy = policy(&self.state.history(None)?);
        for disk in &self.plan.disks {
            let Ok(chain) = Chain::open(&disk.old, disk.old_format, &policy) else { continue };
            let nodes = chain.layers().rev().flat_map(|layer| machine.nodes_on(&layer.path));
            close_nodes(&session.qmp, nodes).await?;
        }
        Ok(())
    }

    async fn remove_old(&self) -> Result<(), StepError> {
        let machine = observe(self.session).await?;
        for disk in &self.plan.disks {
            let is_open = machine.as_ref().is_some_and(|machine| machine.has_open(&disk.old) == Some(true));
            if is_open {
                return Err(StepError::StillOpen { path: disk.old.clone() });
            }
            if aside::is_device(&disk.old) {
                aside::remove_device(&disk.old)?;
            } else if disk.old.exists() {
                files::remove_durably(&disk.old)?;
            }
        }
        Ok(())
    }

    /// Those of the new layers that are overlays.
    fn overlays(&self) -> Vec<DiskPlan> {
        let overlays = self.plan.disks.iter().filter(|disk| disk.renewed.is_none());
        overlays.map(|disk| disk.new.clone()).collect()
    }

    fn new_disks(&self) -> Vec<DiskPlan> {
        self.plan.disks.iter().map(|disk| disk.new.clone()).collect()
    }
}

/// Source: QEMU docs/interop/live-block-operations.rst; with `sync=none` a mirror is ready at once, and completing it
/// puts the target in the place of the source.
async fn switch_one(qmp: &Qmp, job: &str, disk: &RevertDisk) -> Result<(), StepError> {
    end(qmp, job).await?;
    let mirror = BlockdevMirror {
        job_id: job.to_owned(),
        device: disk.root.clone(),
        target: disk.new.overlay_node.clone(),
        // A filter above the layer stays where it is.
        replaces: (disk.root != disk.new.node).then(|| disk.new.node.clone()),
        sync: "none".into(),
        auto_dismiss: false,
    };
    tell(qmp, &mirror).await?;
    wait_for(qmp, job, "ready", LIMIT).await?;
    tell(qmp, &JobComplete { id: job.to_owned() }).await?;
    let ended = wait_for(qmp, job, CONCLUDED, LIMIT).await?;
    let ended = ended.ok_or_else(|| StepError::JobGone { job: job.to_owned() })?;
    tell(qmp, &JobDismiss { id: job.to_owned() }).await?;
    ended.error.map_or(Ok(()), |error| Err(StepError::Job { job: job.to_owned(), error }))
}
