//! The thaw guard, seen from the process that takes the snapshot.
//!
//! The guard is this executable again, in a session of its own, started before the freeze. From then on it
//! alone talks to the agent: its parent asks it to freeze and to thaw. If the parent dies, however it
//! dies, the pipe between them closes and the guard thaws; if the limit passes, it thaws; if the freeze
//! fails or is late, it thaws behind it, for a late freeze still happens. If the guard itself dies, its
//! parent, which kept a second descriptor of the agent's socket, thaws.

mod process;
mod wire;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::RecvFlags;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::agent::sync_id;
use crate::error::{Error, Refusal};
use crate::frame::Limits;
use crate::qmp::decode;
use crate::transport::{Connection, Matching};
use wire::{Order, Report, Task};

#[cfg(feature = "fuzzing")]
pub use process::fuzz_guard;
pub use process::guard_main;
pub use wire::now_ns as monotonic_ns;

/// How long a thaw may take before it is reported as unconfirmed. The guard goes on after it.
pub const THAW_GRACE: Duration = Duration::from_secs(10);
/// How long the guard's process may take to start.
const START_LIMIT: Duration = Duration::from_secs(5);

/// What the guard is started with.
#[derive(Clone, Debug)]
pub struct GuardRequest {
    /// The executable whose `main` calls [`guard_main`], usually `/proc/self/exe`.
    pub program: PathBuf,
    /// The arguments that make it do so.
    pub arguments: Vec<String>,
    /// Mount points to freeze; all file systems if empty.
    pub mountpoints: Vec<String>,
    /// How long the freeze may hold, from the moment its command is sent.
    pub limit: Duration,
}

/// A confirmed freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// File systems that the agent says it froze; 0 means that nothing is frozen.
    pub filesystems: u64,
    /// When the command was sent, in nanoseconds of `CLOCK_MONOTONIC`.
    pub sent_ns: u64,
    /// When it was confirmed.
    pub confirmed_ns: u64,
}

/// A confirmed thaw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thawed {
    /// File systems that the agent says it thawed; none where the thaw had to be sent more than once.
    pub filesystems: Option<u64>,
    /// When the thaw was sent for the first time, in nanoseconds of `CLOCK_MONOTONIC`.
    pub sent_ns: u64,
    /// When it was confirmed.
    pub confirmed_ns: u64,
    /// Whether the guard thawed by itself: the limit had passed, the agent's socket broke, or somebody ended
    /// the guard. The freeze may have been over at any time since [`Guard::holds`] was last true.
    pub expired: bool,
}

/// The freeze or the thaw did not go as it should.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// The guard could not be started. Nothing was frozen.
    #[error("the thaw guard could not be started ({what}); nothing was frozen")]
    Start {
        /// What failed.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The guest did not freeze. It was thawed for safety, and the thaw is confirmed.
    #[error("the guest did not freeze: {reason}; it is thawed")]
    NotFrozen {
        /// What the agent said, or that it said nothing.
        reason: String,
    },
    /// The guest may be frozen still. The guard keeps trying, if it lives.
    #[error("the thaw is not confirmed: {reason}; the guest may still be frozen, and {}", keeper(*.guard))]
    ThawUnconfirmed {
        /// What went wrong.
        reason: String,
        /// The guard's process; 0 if it is dead and nobody tries any more.
        guard: u32,
    },
    /// QEMU went away in the freeze window.
    #[error("QEMU went away while the guest was being frozen")]
    Gone,
}

fn keeper(guard: u32) -> String {
    match guard {
        0 => "the thaw guard is dead".to_owned(),
        pid => format!("the thaw guard (pid {pid}) keeps trying"),
    }
}

/// The hold on a guest that is about to be frozen.
#[derive(Debug)]
pub struct Guard {
    child: Child,
    pid: u32,
    orders: OwnedWriteHalf,
    reports: BufReader<OwnedReadHalf>,
    /// The agent's socket, for the case that the guard dies before its parent.
    spare: StdUnixStream,
    limit: Duration,
    expired: bool,
}

impl Guard {
    /// Starts the guard over the agent's connected socket and waits until it is ready.
    ///
    /// `agent_path` is where a second connection would go, should the first one break.
    ///
    /// # Errors
    /// [`GuardError::Start`]; nothing was frozen then.
    pub async fn start(
        agent: StdUnixStream,
        agent_path: &Path,
        request: &GuardRequest,
    ) -> Result<Self, GuardError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |source| GuardError::Start { what, source }
        };
        let spare = agent.try_clone().map_err(failed("no descriptor"))?;
        let (ours, theirs) = StdUnixStream::pair().map_err(failed("no socket pair"))?;
        ours.set_nonblocking(true).map_err(failed("socket pair"))?;
        let child = Command::new(&request.program)
            .args(&request.arguments)
            .stdin(Stdio::from(OwnedFd::from(agent)))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .stderr(Stdio::null())
            .current_dir("/")
            .spawn()
            .map_err(failed("its process"))?;
        let stream = UnixStream::from_std(ours).map_err(failed("socket pair"))?;
        let (reports, orders) = stream.into_split();
        let pid = child.id().unwrap_or(0);
        let reports = BufReader::new(reports);
        let mut guard = Self { child, pid, orders, reports, spare, limit: request.limit, expired: false };
        let task = Task {
            agent: agent_path.to_owned(),
            mountpoints: request.mountpoints.clone(),
            limit_ns: u64::try_from(request.limit.as_nanos()).unwrap_or(u64::MAX),
        };
        guard.say(&task).await.map_err(failed("its task"))?;
        match timeout(START_LIMIT, guard.report()).await {
            Ok(Some(Report::Ready)) => Ok(guard),
            _ => Err(failed("it did not get ready")(std::io::ErrorKind::TimedOut.into())),
        }
    }

    /// Freezes. On any error the guest has been thawed behind the attempt, or the error says that this
    /// is not confirmed.
    ///
    /// # Errors
    /// [`GuardError::NotFrozen`] if the agent refused, answered garbage, or did not answer within the
    /// limit; [`GuardError::ThawUnconfirmed`]; [`GuardError::Gone`].
    pub async fn freeze(&mut self) -> Result<Frozen, GuardError> {
        // One that has ended already has said why.
        let _ = self.say(&Order::Freeze).await;
        let Ok(report) = timeout(self.limit.saturating_add(THAW_GRACE), self.report()).await else {
            // Its clock is ours: it is stopped. Two may not read one stream, so it has to go first.
            let _ = self.child.kill().await;
            return Err(self.abandoned("the thaw guard hung").await);
        };
        match report {
            Some(Report::Frozen { filesystems, sent_ns, confirmed_ns }) => {
                Ok(Frozen { filesystems, sent_ns, confirmed_ns })
            }
            Some(Report::Failed { reason }) => Err(self.not_frozen(reason).await),
            Some(Report::Expired) => {
                let reason = format!("the agent did not confirm the freeze within {:?}", self.limit);
                Err(self.not_frozen(reason).await)
            }
            Some(Report::Gone) => Err(GuardError::Gone),
            _ => Err(self.abandoned("the thaw guard died").await),
        }
    }

    /// Whether the freeze still holds, as far as the guard has said: false once the limit has passed.
    ///
    /// It costs no round trip; ask it right before the point in time is made.
    pub fn holds(&self) -> bool {
        // The guard is silent between `Frozen` and the order to thaw, so a byte, or its end, means no.
        // Asked of the kernel, since tokio's view of the socket may be older than the guard's last word.
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let waiting = rustix::net::recv(self.reports.get_ref().as_ref(), &mut [0; 1], flags);
        self.reports.buffer().is_empty() && matches!(waiting, Err(Errno::AGAIN))
    }

    /// Thaws and waits until the agent has confirmed it.
    ///
    /// # Errors
    /// [`GuardError::ThawUnconfirmed`] after [`THAW_GRACE`]; the guard keeps trying. [`GuardError::Gone`].
    pub async fn thaw(mut self) -> Result<Thawed, GuardError> {
        // A guard that has thawed by itself has also closed its end; its last words are still there.
        let _ = self.say(&Order::Thaw).await;
        self.thawed().await
    }

    async fn thawed(&mut self) -> Result<Thawed, GuardError> {
        let unconfirmed = |reason: String, guard| GuardError::ThawUnconfirmed { reason, guard };
        let wait = async {
            loop {
                match self.report().await {
                    Some(Report::Expired | Report::Failed { .. }) => self.expired = true,
                    Some(Report::Thawed { filesystems, sent_ns, confirmed_ns }) => {
                        let expired = self.expired;
                        return Some(Ok(Thawed { filesystems, sent_ns, confirmed_ns, expired }));
                    }
                    Some(Report::Gone) => return Some(Err(GuardError::Gone)),
                    Some(Report::Ready | Report::Frozen { .. }) => {}
                    None => return None,
                }
            }
        };
        match timeout(THAW_GRACE, wait).await {
            Ok(Some(outcome)) => {
                let _ = self.child.wait().await;
                outcome
            }
            Ok(None) => self.thaw_without_guard().await.map_err(|fault| unconfirmed(fault.to_string(), 0)),
            Err(_) => {
                let reason = format!("the agent did not confirm it within {THAW_GRACE:?}");
                Err(unconfirmed(reason, self.pid))
            }
        }
    }

    async fn not_frozen(&mut self, reason: String) -> GuardError {
        match self.thawed().await {
            Ok(_) => GuardError::NotFrozen { reason },
            Err(fault) => fault,
        }
    }

    async fn abandoned(&mut self, reason: &str) -> GuardError {
        match self.thaw_without_guard().await {
            Ok(_) => GuardError::NotFrozen { reason: reason.to_owned() },
            Err(fault) => GuardError::ThawUnconfirmed { reason: format!("{reason}; {fault}"), guard: 0 },
        }
    }

    async fn thaw_without_guard(&mut self) -> Result<Thawed, Error> {
        let local = |source| Error::Local { what: "cannot use the agent's socket".into(), source };
        let stream = self.spare.try_clone().and_then(UnixStream::from_std).map_err(local)?;
        let connection = Connection::over(stream, Limits::AGENT, Matching::Order);
        let command = "guest-fsfreeze-thaw";
        let sent_ns = monotonic_ns();
        // Both are sent at once: an agent that hangs now finds the thaw behind its freeze later.
        let (synced, reply) = tokio::join!(
            connection.sync(sync_id(), THAW_GRACE),
            connection.call(command, None::<Value>, Vec::new(), THAW_GRACE),
        );
        synced?;
        let filesystems = match reply {
            Err(Error::Refused { refusal, .. }) if is_forestalled(&refusal) => 0,
            reply => decode(command, &reply?)?,
        };
        let filesystems = Some(filesystems);
        Ok(Thawed { filesystems, sent_ns, confirmed_ns: monotonic_ns(), expired: true })
    }

    /// Tells the guard something. Fails once it has ended.
    async fn say<T: serde::Serialize>(&mut self, line: &T) -> std::io::Result<()> {
        let mut bytes = serde_json::to_vec(line)?;
        bytes.push(b'\n');
        self.orders.write_all(&bytes).await
    }

    /// The guard's next line, or none if it has ended.
    async fn report(&mut self) -> Option<Report> {
        let mut line = String::new();
        match self.reports.read_line(&mut line).await {
            Ok(count) if count > 0 => serde_json::from_str(&line).ok(),
            _ => None,
        }
    }
}

/// Windows refuses a thaw that its own 10 s limit has forestalled; nothing is frozen then.
///
/// Source: QEMU qga/vss-win32/requester.cpp; qga/qapi-schema.json, `guest-fsfreeze-freeze`.
fn is_forestalled(refusal: &Refusal) -> bool {
    refusal.desc.contains("fsfreeze is limited")
}
