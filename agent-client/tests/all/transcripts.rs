//! What hostile peers say, word for word, and what our clients make of it.
//!
//! The name of a case begins with the row of the failure catalogue that it defends. The client of each case
//! runs in a process of its own, so that the bound on its memory means something.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use agent_client::{
    Agent, BlockdevDel, CloseReason, Error, FreezeStatus, Qmp, QueryBlock, QueryBlockGraph, QueryBlockJobs,
    QueryChardev, QueryJobs, QueryMigrate, QueryName, QueryNamedBlockNodes, QueryStatus,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::broadcast;

use crate::peer::{GREETING, Step, answer, echo, play, send};

mod agent;
mod qmp;
mod queue;

/// A client that has said nothing by then hangs.
const HANG: Duration = Duration::from_secs(50);
/// For commands that are answered.
const AMPLE: Duration = Duration::from_secs(20);
/// For commands that are not.
const SHORT: Duration = Duration::from_millis(300);
/// What a case may add to the client's memory unless it says otherwise, in MiB.
const MEMORY: u64 = 8;

/// What the client does.
#[derive(Clone, Copy)]
enum Call {
    /// Connects to a monitor; returns QEMU's version and package.
    Qmp,
    /// Runs a raw QMP command without arguments; returns the reply's text.
    Raw(&'static str),
    /// Runs so many raw QMP commands one after another, then returns the last reply.
    Times(&'static str, usize),
    /// Runs so many raw QMP commands at once; each must get the reply that names it.
    AtOnce(usize),
    /// Starts a raw QMP command and stops waiting when an event arrives.
    Dropped(&'static str),
    /// Runs a raw QMP command with so much text as its argument.
    Bulk(&'static str, usize),
    /// Runs `add-fd` with so many descriptors, each of a file that holds its number from here on.
    Descriptors(usize, usize),
    /// Prepares a `query-status` and lets it go.
    PreparedDropped,
    /// Prepares a `query-status` and fires it.
    Fired,
    /// Begins to listen to events, without reading them.
    Listen,
    /// The next event that was heard: its name and data.
    Event,
    /// A typed QMP command by its name; returns its debug text.
    Typed(&'static str),
    /// Connects to an agent.
    Agent,
    /// Runs a raw agent command.
    Ask(&'static str),
    /// The same, within [`SHORT`].
    AskShort(&'static str),
    /// Starts a raw agent command and stops waiting after [`SHORT`].
    AskDropped(&'static str),
    /// Runs a raw agent command with so much text as its argument, within [`SHORT`].
    AskBulk(usize),
    /// A typed agent command by its name; returns its debug text.
    Guest(&'static str),
    /// `Agent::require`.
    Require(&'static str),
    /// Gives the agent's socket up.
    IntoSocket,
}

/// What comes of a call: text that the result or the error must contain; for an error also its kind.
enum Expected {
    Ok(&'static str),
    Fails(&'static str, &'static str),
}

/// One transcript.
struct Case {
    peer: Vec<Step>,
    calls: Vec<(Call, Expected)>,
    limit: Duration,
    memory: u64,
}

impl Case {
    fn limit(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    fn memory(self, mebibytes: u64) -> Self {
        Self { memory: mebibytes, ..self }
    }
}

/// A case that begins when the client connects.
fn raw(peer: Vec<Step>, calls: Vec<(Call, Expected)>) -> Case {
    Case { peer, calls, limit: AMPLE, memory: MEMORY }
}

/// A case that begins when a monitor has greeted.
fn qmp(mut peer: Vec<Step>, mut calls: Vec<(Call, Expected)>) -> Case {
    peer.insert(0, Step::Greet);
    calls.insert(0, (Call::Qmp, ok("7.2.22")));
    raw(peer, calls)
}

/// A case that begins when an agent has answered the sync.
fn agent(mut peer: Vec<Step>, mut calls: Vec<(Call, Expected)>) -> Case {
    peer.insert(0, Step::Synced);
    calls.insert(0, (Call::Agent, ok("")));
    raw(peer, calls)
}

fn ok(text: &'static str) -> Expected {
    Expected::Ok(text)
}

fn fails(kind: &'static str, text: &'static str) -> Expected {
    Expected::Fails(kind, text)
}

/// Makes a test of each case, and a function that finds a case by its name.
macro_rules! transcripts {
    ($($name:ident: $case:expr;)+) => {
        $(#[test] fn $name() { super::run(concat!(module_path!(), "::", stringify!($name)), $case); })+

        pub(super) fn find(name: &str) -> Option<super::Case> {
            match name.strip_prefix(concat!(module_path!(), "::"))? {
                $(stringify!($name) => Some($case),)+
                _ => None,
            }
        }
    };
}
use transcripts;

/// What one call came to, as the client's process tells it.
#[derive(Debug, Deserialize, Serialize)]
struct Outcome {
    /// `ok`, or the error's kind.
    kind: String,
    text: String,
}

#[derive(Debug, Deserialize, Serialize)]
struct Told {
    outcomes: Vec<Outcome>,
    grown_kib: u64,
}

/// Plays a case: the peer here, its client in a process of its own.
fn run(name: &str, case: Case) {
    let dir = tempfile::tempdir().unwrap();
    let (socket, told) = (dir.path().join("socket"), dir.path().join("told"));
    let listener = UnixListener::bind(&socket).unwrap();
    let steps = case.peer;
    let peer = std::thread::spawn(move || play(&listener, steps));
    let client = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "transcripts::client", "--nocapture"])
        .env("TRANSCRIPT", name)
        .env("TRANSCRIPT_SOCKET", &socket)
        .env("TRANSCRIPT_TOLD", &told)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&client.stderr).into_owned();
    assert!(client.status.success(), "{said}{}", String::from_utf8_lossy(&client.stdout));
    peer.join().unwrap().unwrap();
    let told: Told = serde_json::from_slice(&std::fs::read(told).unwrap()).unwrap();
    assert_eq!(told.outcomes.len(), case.calls.len(), "{told:?}");
    for (number, (outcome, (_, expected))) in told.outcomes.iter().zip(&case.calls).enumerate() {
        let (kind, text) = match expected {
            Expected::Ok(text) => ("ok", text),
            Expected::Fails(kind, text) => (*kind, text),
        };
        assert_eq!(outcome.kind, kind, "call {number}: {}", outcome.text);
        assert!(outcome.text.contains(text), "call {number}: no {text:?} in {}", outcome.text);
    }
    let grown = told.grown_kib / 1024;
    assert!(grown <= case.memory, "the client grew by {grown} MiB, allowed are {}", case.memory);
}

/// The client's process. It is started by [`run`].
#[test]
#[ignore = "the client's process, started by the tests here"]
fn client() {
    let name = std::env::var("TRANSCRIPT").unwrap();
    let case = qmp::find(&name).or_else(|| agent::find(&name)).unwrap();
    let socket = PathBuf::from(std::env::var_os("TRANSCRIPT_SOCKET").unwrap());
    let told = std::env::var_os("TRANSCRIPT_TOLD").unwrap();
    let Case { calls, limit, .. } = case;
    drop(case.peer);
    let calls: Vec<Call> = calls.into_iter().map(|(call, _)| call).collect();

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // From here on the peak counts anew. Source: proc(5), /proc/pid/clear_refs.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status_kib("VmRSS:");
    let all = async {
        let mut client = Client::new(&socket, limit);
        let mut outcomes = Vec::new();
        for call in calls {
            outcomes.push(outcome(client.call(call).await));
        }
        outcomes
    };
    let outcomes =
        runtime.block_on(async { tokio::time::timeout(HANG, all).await }).expect("the client hangs");
    let grown_kib = status_kib("VmHWM:").saturating_sub(before);
    std::fs::write(told, serde_json::to_vec(&Told { outcomes, grown_kib }).unwrap()).unwrap();
}

fn status_kib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn outcome(result: Result<String, Error>) -> Outcome {
    let fault = match result {
        Ok(text) => return Outcome { kind: "ok".into(), text: text.chars().take(2000).collect() },
        Err(fault) => fault,
    };
    let kind = match &fault {
        Error::Connect { .. } => "connect",
        Error::NoGreeting { .. } => "no greeting",
        Error::NotQmp { .. } => "not qmp",
        Error::Timeout { .. } => "timeout",
        Error::Closed { reason: CloseReason::Eof, .. } => "closed: eof",
        Error::Closed { reason: CloseReason::Limit(_), .. } => "closed: limit",
        Error::Closed { reason: CloseReason::Malformed(_), .. } => "closed: malformed",
        Error::Closed { reason: CloseReason::Io(_), .. } => "closed: io",
        Error::Closed { reason: CloseReason::Local, .. } => "closed: local",
        Error::Refused { .. } => "refused",
        Error::Unexpected { .. } => "unexpected",
        Error::Unavailable { .. } => "unavailable",
        Error::Encode { .. } => "encode",
        Error::Local { .. } => "local",
    };
    let text = fault.to_string();
    // P7: whatever was sent, a message can be shown.
    let steers = |c: char| c.is_control() || matches!(c, '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}');
    assert!(!text.contains(steers), "not fit for a terminal: {text:?}");
    assert!(text.chars().count() < 12_000, "too long for a message: {}", text.len());
    Outcome { kind: kind.into(), text }
}

struct Client<'a> {
    socket: &'a Path,
    limit: Duration,
    qmp: Option<Qmp>,
    agent: Option<Agent>,
    events: Option<broadcast::Receiver<agent_client::Event>>,
}

impl<'a> Client<'a> {
    fn new(socket: &'a Path, limit: Duration) -> Self {
        Self { socket, limit, qmp: None, agent: None, events: None }
    }

    async fn call(&mut self, call: Call) -> Result<String, Error> {
        match call {
            Call::Qmp => {
                let qmp = Qmp::connect(self.socket, self.limit, self.limit).await?;
                let version = qmp.version();
                let text = format!("{} {}", version.qemu, version.package);
                self.qmp = Some(qmp);
                Ok(text)
            }
            Call::Agent => {
                self.agent = Some(Agent::connect(self.socket, self.limit, self.limit).await?);
                Ok(String::new())
            }
            Call::IntoSocket => {
                let given = self.agent.take().unwrap().into_socket().await;
                given.map(|_| String::new()).map_err(|source| Error::Local { what: "socket".into(), source })
            }
            Call::Listen => {
                self.events = Some(self.qmp.as_ref().unwrap().events());
                Ok(String::new())
            }
            Call::Event => loop {
                match self.events.as_mut().unwrap().recv().await {
                    Ok(event) => return Ok(format!("{} {}", event.name, event.data)),
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(fault) => panic!("{fault}"),
                }
            },
            Call::Guest(_) | Call::Require(_) | Call::Ask(_) | Call::AskShort(_) => self.ask(call).await,
            Call::AskDropped(_) | Call::AskBulk(_) => self.ask(call).await,
            _ => self.run(call).await,
        }
    }

    async fn run(&self, call: Call) -> Result<String, Error> {
        let qmp = self.qmp.as_ref().unwrap();
        let none = Value::Null;
        match call {
            Call::Raw(name) => Ok(qmp.execute_raw(name, none).await?.to_string()),
            Call::Times(name, count) => {
                for _ in 1..count {
                    qmp.execute_raw(name, Value::Null).await?;
                }
                Ok(qmp.execute_raw(name, none).await?.to_string())
            }
            Call::AtOnce(count) => {
                let names: Vec<String> = (0..count).map(|number| format!("x-{number}")).collect();
                let one = async |name: &String| {
                    let reply = qmp.execute_raw(name, Value::Null).await?;
                    assert_eq!(reply.get(), format!("{name:?}"));
                    Ok::<_, Error>(())
                };
                // Polled in turn, so all are sent before any is answered.
                let mut all: Vec<_> = names.iter().map(|name| Box::pin(one(name))).collect();
                std::future::poll_fn(|context| {
                    let mut index = 0;
                    while index < all.len() {
                        match all[index].as_mut().poll(context) {
                            std::task::Poll::Ready(done) => {
                                done.unwrap();
                                drop(all.remove(index));
                            }
                            std::task::Poll::Pending => index += 1,
                        }
                    }
                    if all.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
                })
                .await;
                Ok(String::new())
            }
            Call::Dropped(name) => {
                let mut events = qmp.events();
                tokio::select! {
                    reply = qmp.execute_raw(name, none) => Ok(format!("not dropped: {reply:?}")),
                    _ = events.recv() => Ok("dropped".into()),
                }
            }
            Call::Bulk(name, length) => {
                let text = serde_json::json!({ "text": "x".repeat(length) });
                Ok(qmp.execute_raw(name, text).await?.to_string())
            }
            Call::Descriptors(count, first) => {
                let fds = (first..first + count).map(file_that_holds).collect();
                Ok(qmp.execute_with_fds("add-fd", serde_json::json!({}), fds).await?.to_string())
            }
            Call::PreparedDropped => {
                drop(qmp.prepare(&QueryStatus {}).await?);
                Ok(String::new())
            }
            Call::Fired => Ok(qmp.prepare(&QueryStatus {}).await?.fire().await?.to_string()),
            Call::Typed(name) => typed(qmp, name).await,
            _ => unreachable!("not a monitor's call"),
        }
    }

    async fn ask(&self, call: Call) -> Result<String, Error> {
        let agent = self.agent.as_ref().unwrap();
        let none = Value::Null;
        match call {
            Call::Ask(name) => Ok(agent.call(name, none).await?.to_string()),
            Call::AskShort(name) => Ok(agent.call_within(name, none, SHORT).await?.to_string()),
            Call::AskDropped(name) => match tokio::time::timeout(SHORT, agent.call(name, none)).await {
                Ok(reply) => Ok(format!("not dropped: {reply:?}")),
                Err(_) => Ok("dropped".into()),
            },
            Call::AskBulk(length) => {
                let text = serde_json::json!({ "text": "x".repeat(length) });
                Ok(agent.call_within("guest-file-write", text, SHORT).await?.to_string())
            }
            Call::Require(name) => agent.require(name).await.map(|()| String::new()),
            Call::Guest(name) => guest(agent, name).await,
            _ => unreachable!("not an agent's call"),
        }
    }
}

fn file_that_holds(number: usize) -> OwnedFd {
    use std::io::{Seek, Write};
    let mut file = tempfile::tempfile().unwrap();
    write!(file, "file {number}").unwrap();
    file.rewind().unwrap();
    file.into()
}

async fn typed(qmp: &Qmp, name: &str) -> Result<String, Error> {
    fn text<T: std::fmt::Debug>(reply: T) -> String {
        format!("{reply:?}")
    }
    match name {
        "query-status" => qmp.execute(&QueryStatus {}).await.map(text),
        "query-name" => qmp.execute(&QueryName {}).await.map(text),
        "query-block" => qmp.execute(&QueryBlock {}).await.map(text),
        "query-named-block-nodes" => qmp.execute(&QueryNamedBlockNodes { flat: true }).await.map(text),
        "x-debug-query-block-graph" => qmp.execute(&QueryBlockGraph {}).await.map(text),
        "query-jobs" => qmp.execute(&QueryJobs {}).await.map(text),
        "query-block-jobs" => qmp.execute(&QueryBlockJobs {}).await.map(text),
        "query-migrate" => qmp.execute(&QueryMigrate {}).await.map(|info| text((info.is_active(), info))),
        "query-chardev" => qmp.execute(&QueryChardev {}).await.map(text),
        "blockdev-del" => qmp.execute(&BlockdevDel { node_name: "n".into() }).await.map(text),
        _ => unreachable!("no typed command"),
    }
}

async fn guest(agent: &Agent, name: &str) -> Result<String, Error> {
    fn text<T: std::fmt::Debug>(reply: T) -> String {
        format!("{reply:?}")
    }
    match name {
        "status" => agent.freeze_status().await.map(|status| match status {
            FreezeStatus::Frozen => "frozen".into(),
            FreezeStatus::Thawed => "thawed".into(),
        }),
        "freeze" => agent.freeze(&[]).await.map(text),
        "freeze-list" => agent.freeze(&["/srv".into()]).await.map(text),
        "thaw" => agent.thaw().await.map(text),
        "filesystems" => agent.filesystems().await.map(|list| format!("{} {:?}", list.len(), list.first())),
        "interfaces" => agent.interfaces().await.map(|list| format!("{} {:?}", list.len(), list.first())),
        "os" => agent.os().await.map(text),
        "hostname" => agent.hostname().await,
        "time" => agent.time().await.map(text),
        "trim" => agent.trim(AMPLE).await.map(text),
        "info" => agent.info().await.map(text),
        "sync-disks" => agent.sync_disks(SHORT).await.map(text),
        _ => unreachable!("no typed command"),
    }
}
