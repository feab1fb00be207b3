//! One block job, from its start to the change of the graph.
//!
//! Jobs that are not a commit of the active layer have `auto-finalize` off, so that the graph changes when it
//! suits. A commit of the active layer finalizes itself: as long as it were pending, QEMU would hold the guest's
//! writes back.
//!
//! Commits have `auto-dismiss` off, so that none ends unseen. Streams dismiss themselves: QEMU 7.2 and 10.0 die
//! when anybody lists their nodes while a stream is concluded and not dismissed (`docs/decisions/`).

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use agent_client::{
    BlockCommit, BlockJobSetSpeed, BlockStream, Event, JobComplete, JobDismiss, JobFinalize, JobInfo,
    JobResume, Qmp, QueryBlockJobs,
};
use model::ByteSize;
use storage::space;
use tokio::sync::Mutex;
use tokio::sync::broadcast::error::TryRecvError;
use tokio::time::{Instant, sleep, timeout};

use super::{Limits, Progress, Watch};
use crate::bitmaps::Descent;
use crate::create::Interrupt;
use crate::error::StepError;
use crate::jobs::{CHANGE_LIMIT, CONCLUDED, end, find, tell, wait_for};
use crate::pause::{Pause, Pauser};

/// How long to wait for an event before a job is looked at again.
const POLL: Duration = Duration::from_millis(50);
/// As [`POLL`], while the guest stands still.
const PAUSED_POLL: Duration = Duration::from_millis(2);
/// A job that got no nearer to its end for so long is slower than the guest.
const STALLED_AFTER: Duration = Duration::from_secs(3);
/// The first time for which the guest is held, so that its job catches up; doubled each time.
const FIRST_PULSE: Duration = Duration::from_millis(100);
/// How long a guest that was held runs before it is held again.
const BETWEEN_PULSES: Duration = Duration::from_millis(200);
/// Room that has to appear before a job that ran out of it goes on.
const ROOM_TO_GO_ON: u64 = 16 << 20;

type Events = tokio::sync::broadcast::Receiver<Event>;

/// What QEMU is asked to do.
#[derive(Clone, Debug)]
pub(super) enum Command {
    Commit(BlockCommit),
    Stream(BlockStream),
}

/// One job.
pub(super) struct Job<'a> {
    pub qmp: &'a Qmp,
    pub id: &'a str,
    pub command: Command,
    /// How the guest is held where a commit of its active layer ends; none if no guest uses the layer.
    pub pauser: Option<&'a Pauser<'a>>,
    /// The bitmaps of an active layer that is committed.
    pub bitmaps: &'a Descent,
    /// Where it writes.
    pub dir: PathBuf,
    pub shared: &'a Shared<'a>,
    /// Which disk's it is, for the progress.
    pub disk: usize,
}

/// What all jobs of an operation have in common.
pub(super) struct Shared<'a> {
    pub limits: Limits,
    pub watch: &'a dyn Watch,
    pub interrupt: &'a Interrupt,
    /// See [`Pauser::turn`].
    pub turn: Mutex<()>,
}

impl Job<'_> {
    /// Runs the job to its end.
    ///
    /// The guest still stands if a pause comes back: the active layer is another one now, and that has to be
    /// durably known before the guest writes to it.
    ///
    /// # Errors
    /// The job is broken off and forgotten, as far as QEMU answers. Whether it had ended is to be looked at.
    pub async fn run(&self) -> Result<Option<Pause<'_>>, StepError> {
        let mut last_words = self.qmp.events();
        match &self.command {
            Command::Commit(commit) => tell(self.qmp, commit).await?,
            Command::Stream(stream) => tell(self.qmp, stream).await?,
        }
        let driven = match host::fault::point("merge.started") {
            Ok(()) => self.drive(&mut last_words).await,
            Err(fault) => Err(fault.into()),
        };
        if driven.is_err() {
            end(self.qmp, self.id).await?;
        }
        driven
    }

    async fn drive(&self, last_words: &mut Events) -> Result<Option<Pause<'_>>, StepError> {
        let mut pace = Pace::new();
        let mut wake = self.qmp.events();
        loop {
            let Some(job) = find(self.qmp, self.id).await? else {
                return self.gone(last_words).map(|()| None);
            };
            self.shared.watch.progress(&Progress::of(self.disk, &job));
            match job.status.as_str() {
                CONCLUDED => return self.conclude(&job).await.map(|()| None),
                "pending" => self.finalize().await?,
                "ready" => match self.complete(&mut pace).await? {
                    ControlFlow::Break(pause) => return Ok(pause),
                    ControlFlow::Continue(()) => {}
                },
                "paused" => self.wait_for_room().await?,
                _ => {
                    if let Some(pause) = self.keep_up(&job, &mut pace).await? {
                        return Ok(Some(pause));
                    }
                }
            }
            self.shared.interrupt.check()?;
            // A job that ends, or is ready, says so; progress is looked at now and then.
            let _ = timeout(POLL, a_change_of_status(&mut wake)).await;
        }
    }

    /// A stream forgets itself; what it said is in its last event.
    fn gone(&self, last_words: &mut Events) -> Result<(), StepError> {
        let is_ours = |event: &Event| event.name == "BLOCK_JOB_COMPLETED" && event.data["device"] == self.id;
        let said = loop {
            match last_words.try_recv() {
                Ok(event) if is_ours(&event) => break Some(event),
                Ok(_) | Err(TryRecvError::Lagged(_)) => {}
                Err(TryRecvError::Empty | TryRecvError::Closed) => break None,
            }
        };
        match (said.as_ref().and_then(|event| event.data["error"].as_str()), &self.command) {
            (Some(error), _) => Err(StepError::Job { job: self.id.to_owned(), error: error.to_owned() }),
            (None, Command::Commit(_)) => Err(self.lost()),
            // Whether it is done is looked at, as after every job.
            (None, Command::Stream(_)) => Ok(()),
        }
    }

    /// Changes the graph.
    async fn finalize(&self) -> Result<(), StepError> {
        host::fault::point("merge.ready")?;
        tell(self.qmp, &JobFinalize { id: self.id.to_owned() }).await?;
        wait_for(self.qmp, self.id, CONCLUDED, CHANGE_LIMIT).await.map(drop)
    }

    /// Lets a commit of the active layer pivot: at once where no guest runs, while it stands still where one
    /// does.
    ///
    /// The guest is held so that both layers are the same until it is durably known which one counts.
    async fn complete(&self, pace: &mut Pace) -> Result<ControlFlow<Option<Pause<'_>>>, StepError> {
        host::fault::point("merge.ready")?;
        let pause = match self.pauser {
            Some(pauser) => pauser.begin().await?,
            None => None,
        };
        host::fault::point("merge.paused")?;
        let pivoted = self.pivot(Instant::now() + self.shared.limits.max_pause).await;
        match pivoted {
            Ok(true) => Ok(ControlFlow::Break(pause)),
            Ok(false) => {
                self.go_on(pause).await?;
                pace.pulse(self.shared.limits.max_pause)?;
                Ok(ControlFlow::Continue(()))
            }
            Err(fault) => {
                self.go_on(pause).await?;
                Err(fault)
            }
        }
    }

    /// False if the rest could not be copied until `deadline`.
    async fn pivot(&self, deadline: Instant) -> Result<bool, StepError> {
        self.set_speed(0).await?;
        loop {
            let job = self.look().await?;
            if job.status == "ready" && job.current_progress >= job.total_progress && self.try_pivot().await?
            {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                self.set_speed(self.shared.limits.speed()).await?;
                return Ok(false);
            }
            sleep(PAUSED_POLL).await;
        }
    }

    /// False if QEMU is not yet willing to: a job that is drained is not, and says so.
    async fn try_pivot(&self) -> Result<bool, StepError> {
        self.bitmaps.carry_out(self.qmp).await?;
        match self.qmp.execute(&JobComplete { id: self.id.to_owned() }).await {
            Ok(_) => {}
            Err(fault) if fault.is_refusal() => return Ok(false),
            Err(fault) => return Err(fault.into()),
        }
        let job = wait_for(self.qmp, self.id, CONCLUDED, CHANGE_LIMIT).await?;
        self.conclude(&job.ok_or_else(|| self.lost())?).await.map(|()| true)
    }

    /// Holds the guest for moments, each time for longer, if it writes faster than the job copies.
    async fn keep_up(&self, job: &JobInfo, pace: &mut Pace) -> Result<Option<Pause<'_>>, StepError> {
        let Some(pauser) = self.pauser.filter(|_| pace.is_stalled(job, Instant::now())) else {
            return Ok(None);
        };
        let pulse = pace.pulse(self.shared.limits.max_pause)?;
        let Some(pause) = pauser.begin().await? else { return Ok(None) };
        match self.pivot(Instant::now() + pulse).await {
            Ok(true) => Ok(Some(pause)),
            Ok(false) => {
                self.go_on(Some(pause)).await?;
                sleep(BETWEEN_PULSES).await;
                Ok(None)
            }
            Err(fault) => {
                self.go_on(Some(pause)).await?;
                Err(fault)
            }
        }
    }

    async fn go_on(&self, pause: Option<Pause<'_>>) -> Result<(), StepError> {
        match pause {
            Some(pause) => pause.end().await,
            None => Ok(()),
        }
    }

    /// Waits until there is room again, and lets the job go on.
    async fn wait_for_room(&self) -> Result<(), StepError> {
        if !self.is_out_of_room().await? {
            return Ok(());
        }
        let available = || space::of(&self.dir).map(|space| space.available);
        let had = available()?;
        self.shared.watch.progress(&Progress::NoRoom { disk: self.disk, dir: self.dir.clone() });
        let deadline = Instant::now() + self.shared.limits.wait_for_room;
        while available()?.0 < had.0.saturating_add(ROOM_TO_GO_ON) {
            if Instant::now() >= deadline {
                let (dir, available) = (self.dir.clone(), had);
                return Err(
                    space::SpaceError::Bytes { dir, needed: ByteSize(ROOM_TO_GO_ON), available }.into()
                );
            }
            self.shared.interrupt.check()?;
            sleep(POLL).await;
        }
        tell(self.qmp, &JobResume { id: self.id.to_owned() }).await
    }

    async fn is_out_of_room(&self) -> Result<bool, StepError> {
        let jobs = self.qmp.execute(&QueryBlockJobs {}).await?;
        Ok(jobs.iter().any(|job| job.device == self.id && job.io_status == "nospace"))
    }

    async fn conclude(&self, job: &JobInfo) -> Result<(), StepError> {
        match &job.error {
            Some(error) => Err(StepError::Job { job: self.id.to_owned(), error: error.clone() }),
            None => tell(self.qmp, &JobDismiss { id: self.id.to_owned() }).await,
        }
    }

    async fn look(&self) -> Result<JobInfo, StepError> {
        find(self.qmp, self.id).await?.ok_or_else(|| self.lost())
    }

    fn lost(&self) -> StepError {
        StepError::JobGone { job: self.id.to_owned() }
    }

    async fn set_speed(&self, speed: u64) -> Result<(), StepError> {
        match self.shared.limits.speed() {
            0 => Ok(()),
            _ => tell(self.qmp, &BlockJobSetSpeed { device: self.id.to_owned(), speed }).await,
        }
    }
}

async fn a_change_of_status(events: &mut Events) {
    while let Ok(event) = events.recv().await {
        if event.name == "JOB_STATUS_CHANGE" {
            return;
        }
    }
}

/// Whether a job gets nearer to its end while the guest writes.
struct Pace {
    least: i64,
    since: Instant,
    pulse: Duration,
}

impl Pace {
    fn new() -> Self {
        Self { least: i64::MAX, since: Instant::now(), pulse: FIRST_PULSE }
    }

    fn is_stalled(&mut self, job: &JobInfo, now: Instant) -> bool {
        let left = job.total_progress.saturating_sub(job.current_progress);
        if left < self.least {
            (self.least, self.since) = (left, now);
        }
        now.duration_since(self.since) >= STALLED_AFTER
    }

    /// How long the guest is to be held this time.
    ///
    /// # Errors
    /// [`StepError::NotConverging`] if the longest time that is allowed did not do.
    fn pulse(&mut self, most: Duration) -> Result<Duration, StepError> {
        let pulse = self.pulse;
        if pulse > most.saturating_mul(2) {
            return Err(StepError::NotConverging { paused: most });
        }
        self.pulse = pulse.saturating_mul(2);
        Ok(pulse.min(most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(current: i64, total: i64) -> JobInfo {
        JobInfo {
            id: "j".into(),
            kind: "commit".into(),
            status: "running".into(),
            current_progress: current,
            total_progress: total,
            error: None,
        }
    }

    #[test]
    fn a_job_is_stalled_when_it_gets_no_nearer_to_its_end() {
        let (mut pace, begun) = (Pace::new(), Instant::now());
        let second = Duration::from_secs(1);
        for step in 0..20 {
            assert!(!pace.is_stalled(&job(i64::from(step), 100), begun + second * step));
        }
        // The guest writes as fast as it copies.
        assert!(!pace.is_stalled(&job(30, 111), begun + second * 20));
        assert!(pace.is_stalled(&job(60, 141), begun + second * 19 + STALLED_AFTER));
    }

    #[test]
    fn pulses_grow_to_the_longest_that_is_allowed_and_then_end() {
        let mut pace = Pace::new();
        let most = Duration::from_millis(300);
        let pulses: Vec<u128> = std::iter::from_fn(|| pace.pulse(most).ok()).map(|p| p.as_millis()).collect();
        assert_eq!(pulses, [100, 200, 300]);
    }
}
