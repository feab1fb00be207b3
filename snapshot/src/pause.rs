//! Holding a guest for moments, so that it stands still however this program ends.
//!
//! A guard, this executable again in a session of its own, is started before the guest is held. If its parent
//! dies, the pipe between them closes; the guard then settles what the parent was doing, as any next command
//! would, and lets the guest go on. Settling comes first: where the guest stood still because its active layer
//! was being changed, it has to be durably known which one counts before the guest writes again.

use std::process::{ExitCode, Stdio};
use std::time::Duration;

use agent_client::{Cont, Qmp, QueryStatus, Stop};
use model::Name;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::{Instant, sleep, timeout};
use vm::{Paths, Session, State};

use crate::error::StepError;
use crate::point::GuardProgram;

/// How long the guard may take to start.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How long the guard may take to end, once it is told that all is over.
const END_LIMIT: Duration = Duration::from_secs(5);
/// For so long the guard tries to settle before it lets the guest go on unsettled.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);
/// Between two of its attempts.
const RETRY: Duration = Duration::from_millis(200);
/// For so long the guard tries to reach QEMU.
const REACH_LIMIT: Duration = Duration::from_secs(600);
/// QEMU's words for a guest that was held by `stop`, and whose memory was written since. Source: qapi/run-state.json,
/// RunState.
pub(crate) const HELD: [&str; 2] = ["paused", "postmigrate"];
/// What the guard is told when it is not needed any more.
const OVER: &[u8] = b"over\n";
const READY: &str = "ready\n";

/// How a guest is held.
#[derive(Debug)]
pub(crate) struct Pauser<'a> {
    pub session: &'a Session,
    pub guard: &'a GuardProgram,
    /// Whose turn it is, where several jobs hold one guest: who goes on would end the hold of another.
    pub turn: &'a Mutex<()>,
}

/// A guest that is held. Dropped without [`Pause::end`], the guard lets it go on.
#[derive(Debug)]
pub(crate) struct Pause<'a> {
    qmp: &'a Qmp,
    guard: Child,
    to_guard: ChildStdin,
    /// When the guest was told to stand still.
    since: Instant,
    _turn: MutexGuard<'a, ()>,
}

/// What the guard is told at its start.
#[derive(Debug, Serialize, Deserialize)]
struct Task {
    vm: Name,
    paths: Paths,
    /// Seconds.
    timeout: f64,
}

impl<'a> Pauser<'a> {
    /// Holds the guest, as soon as nobody else does; all its requests are done and flushed then. None if it did
    /// not run.
    ///
    /// # Errors
    /// The guest runs on, or the guard lets it.
    pub async fn begin(&self) -> Result<Option<Pause<'a>>, StepError> {
        let turn = self.turn.lock().await;
        if !self.session.qmp.execute(&QueryStatus {}).await?.running {
            return Ok(None);
        }
        let (guard, to_guard) = timeout(START_LIMIT, self.start_guard())
            .await
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
            .map_err(StepError::ResumeGuard)?;
        let since = Instant::now();
        let pause = Pause { qmp: &self.session.qmp, guard, to_guard, since, _turn: turn };
        self.session.qmp.execute(&Stop {}).await?;
        Ok(Some(pause))
    }

    async fn start_guard(&self) -> std::io::Result<(Child, ChildStdin)> {
        let mut command = Command::new(&self.guard.program);
        command.args(&self.guard.arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        // The points at which a test lets its parent die are not its own.
        command.env_remove(host::fault::VARIABLE);
        let mut child = command.spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let (Some(mut stdin), Some(stdout)) = (stdin, stdout) else {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        };
        let Session { vm, paths, timeout, .. } = self.session;
        let task = Task { vm: vm.clone(), paths: paths.clone(), timeout: timeout.as_secs_f64() };
        let mut line = serde_json::to_vec(&task)?;
        line.push(b'\n');
        stdin.write_all(&line).await?;
        let mut ready = String::new();
        BufReader::new(stdout).read_line(&mut ready).await?;
        match ready == READY {
            true => Ok((child, stdin)),
            false => Err(std::io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl Pause<'_> {
    /// For how long the guest has been held.
    pub fn lasted(&self) -> Duration {
        self.since.elapsed()
    }

    /// Lets the guest go on, and looks whether it does.
    ///
    /// # Errors
    /// The guard, which lives on, tries it too.
    pub async fn end(mut self) -> Result<(), StepError> {
        self.qmp.execute(&Cont {}).await?;
        let status = self.qmp.execute(&QueryStatus {}).await?;
        if HELD.contains(&status.status.as_str()) {
            return Err(StepError::StillPaused);
        }
        // A guard that is gone already needs not be told; one that does not end is no reason to wait.
        let _ = self.to_guard.write_all(OVER).await;
        drop(self.to_guard);
        let _ = timeout(END_LIMIT, self.guard.wait()).await;
        Ok(())
    }
}

/// Runs the guard. Called by the executable that was started with the arguments of [`GuardProgram`].
pub async fn resume_guard_main() -> ExitCode {
    // A session of its own: no terminal's Ctrl-C or hang-up reaches it. Root may ask to be spared when memory
    // runs short.
    let _ = rustix::process::setsid();
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    match watch().await {
        Some(task) => ExitCode::from(u8::from(!go_on(&task).await)),
        None => ExitCode::SUCCESS,
    }
}

/// Waits for the parent's end. None if it said before that all is over.
async fn watch() -> Option<Task> {
    let mut parent = BufReader::new(tokio::io::stdin());
    let mut line = String::new();
    parent.read_line(&mut line).await.ok()?;
    let task = serde_json::from_str(&line).ok()?;
    let mut stdout = tokio::io::stdout();
    stdout.write_all(READY.as_bytes()).await.ok()?;
    stdout.flush().await.ok()?;
    let mut rest = Vec::new();
    // A read that fails is as good as an end.
    let _ = parent.read_to_end(&mut rest).await;
    (rest != OVER).then_some(task)
}

/// Settles and lets the guest go on; false if QEMU cannot be reached.
async fn go_on(task: &Task) -> bool {
    let since = Instant::now();
    let limit = Duration::try_from_secs_f64(task.timeout).unwrap_or(SETTLE_LIMIT);
    while since.elapsed() < REACH_LIMIT {
        match Session::open(&task.paths, &task.vm, Some(SETTLE_LIMIT), limit).await {
            Ok(session) => {
                let settled = settle(&session, &task.paths).await;
                if (settled || since.elapsed() >= SETTLE_LIMIT) && resume(&session.qmp).await {
                    return true;
                }
            }
            // QEMU is gone, and its guest with it.
            Err(vm::Error::NotRunning { .. } | vm::Error::NoSuchVm { .. }) => return true,
            Err(_) => {}
        }
        sleep(RETRY).await;
    }
    false
}

async fn settle(session: &Session, paths: &Paths) -> bool {
    match State::open(paths) {
        Ok(state) => crate::recover(session, &state).await.is_ok(),
        Err(_) => false,
    }
}

/// A guest that stands still for another reason is left alone.
async fn resume(qmp: &Qmp) -> bool {
    match qmp.execute(&QueryStatus {}).await {
        Ok(status) if HELD.contains(&status.status.as_str()) => qmp.execute(&Cont {}).await.is_ok(),
        asked => asked.is_ok(),
    }
}
