//! The thaw guard as the process that it is, between a parent that dies and an agent that misbehaves.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use agent_client::{Agent, Guard, GuardError, GuardRequest, THAW_GRACE, guard_main, procfs};
use rustix::process::{Pid, Signal, kill_process};

/// What takes this long hangs.
const HANG: Duration = Duration::from_secs(60);
/// A limit on the freeze that no test waits for.
const AMPLE: Duration = Duration::from_secs(600);
/// A limit on the freeze that a test waits for.
const SHORT: Duration = Duration::from_millis(300);

const FREEZE: &str = "guest-fsfreeze-freeze";
const THAW: &str = "guest-fsfreeze-thaw";
const SYNC: &str = "guest-sync-delimited";

/// What the agent does about a command.
enum Act {
    /// Sends bytes; `$sync` stands for the newest sync's value.
    Send(Vec<u8>),
    /// Sends the same bytes so many times.
    Flood(&'static [u8], usize),
    /// Closes the connection, and waits for the next one.
    HangUp,
    /// Closes the connection and the socket, and removes it.
    Leave,
}

fn reply(value: &str) -> Vec<Act> {
    vec![Act::Send(format!("{{\"return\": {value}}}\n").into_bytes())]
}

fn refuse(desc: &str) -> Vec<Act> {
    vec![Act::Send(
        format!("{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"{desc}\"}}}}\n").into_bytes(),
    )]
}

fn echo() -> Vec<Act> {
    vec![Act::Send(b"\xff{\"return\": $sync}\n".to_vec())]
}

/// What an agent that behaves would do.
fn well(command: &str) -> Vec<Act> {
    match command {
        SYNC => echo(),
        FREEZE | THAW => reply("2"),
        _ => refuse("not in this script"),
    }
}

type Log = Arc<(Mutex<Vec<String>>, Condvar)>;

/// A guest whose agent acts by a script, and who writes down what it was asked.
struct Guest {
    dir: tempfile::TempDir,
    log: Log,
}

impl Guest {
    /// The script is given the command and the number of earlier ones of the same name.
    fn new(script: impl FnMut(&str, usize) -> Vec<Act> + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("qga")).unwrap();
        let log = Log::default();
        let guest = Self { dir, log: Arc::clone(&log) };
        let path = guest.path();
        // It ends with the test's process at the latest.
        std::thread::spawn(move || serve(&listener, &path, &log, script));
        guest
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("qga")
    }

    fn log(&self) -> Vec<String> {
        self.log.0.lock().unwrap().clone()
    }

    /// Waits until `seen` is true of what was asked.
    fn wait(&self, what: &str, seen: impl Fn(&[String]) -> bool) -> Vec<String> {
        let log = self.log.0.lock().unwrap();
        let (log, late) = self.log.1.wait_timeout_while(log, HANG, |log| !seen(log)).unwrap();
        assert!(!late.timed_out(), "no {what}: {log:?}");
        log.clone()
    }

    fn wait_for(&self, command: &str, times: usize) -> Vec<String> {
        self.wait(command, |log| log.iter().filter(|entry| *entry == command).count() >= times)
    }

    /// The guard that was started for this guest.
    fn guard(&self) -> u32 {
        let marker = self.path();
        let marks = |pid: &u32| {
            procfs::command_line(*pid).is_some_and(|words| {
                words.iter().any(|word| word == marker.as_os_str().as_encoded_bytes())
                    && words.iter().any(|word| word == b"guard::role")
            })
        };
        procfs::pids().into_iter().find(marks).expect("there is no guard")
    }

    async fn agent(&self) -> Agent {
        Agent::connect(&self.path(), HANG, HANG).await.unwrap()
    }

    async fn start(&self, limit: Duration) -> Guard {
        start(&self.path(), limit).await
    }
}

fn serve(listener: &UnixListener, path: &Path, log: &Log, mut script: impl FnMut(&str, usize) -> Vec<Act>) {
    let note = |entry: &str| {
        log.0.lock().unwrap().push(entry.to_owned());
        log.1.notify_all();
    };
    let mut sync = String::new();
    while let Ok((stream, _)) = listener.accept() {
        let mut commands = Commands { stream: stream.try_clone().unwrap(), buffer: VecDeque::new() };
        'connection: while let Some(line) = commands.next() {
            let Ok(command) = serde_json::from_slice::<serde_json::Value>(&line) else {
                note("garbage");
                continue;
            };
            let name = command["execute"].as_str().unwrap_or("nothing").to_owned();
            if name == SYNC {
                sync = command["arguments"]["id"].to_string();
            }
            let earlier = log.0.lock().unwrap().iter().filter(|entry| **entry == name).count();
            note(&name);
            for act in script(&name, earlier) {
                let sent = match act {
                    Act::Send(bytes) => {
                        let text = bytes.iter().map(|byte| *byte as char).collect::<String>();
                        let text = text.replace("$sync", &sync);
                        (&stream).write_all(&text.chars().map(|c| c as u8).collect::<Vec<u8>>())
                    }
                    Act::Flood(unit, times) => {
                        let block = unit.repeat(times.min(4096));
                        (0..times.div_ceil(4096)).try_for_each(|_| (&stream).write_all(&block))
                    }
                    Act::HangUp => {
                        stream.shutdown(std::net::Shutdown::Both).unwrap();
                        break 'connection;
                    }
                    Act::Leave => {
                        std::fs::remove_file(path).unwrap();
                        return note("left");
                    }
                };
                if sent.is_err() {
                    break 'connection;
                }
            }
        }
        note("hung up");
    }
}

/// Cuts lines; 0xFF takes back what was begun, as qemu-ga's parser does.
struct Commands {
    stream: UnixStream,
    buffer: VecDeque<u8>,
}

impl Commands {
    fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(at) = self.buffer.iter().position(|byte| matches!(byte, 0xff | b'\n')) {
                let line: Vec<u8> = self.buffer.drain(..=at).collect();
                if line[at] == b'\n' && at > 0 {
                    return Some(line);
                }
                continue;
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(count) if count > 0 => self.buffer.extend(&chunk[..count]),
                _ => return None,
            }
        }
    }
}

fn request(agent: &Path, limit: Duration) -> GuardRequest {
    // The test harness prints to standard output, which is the guard's socket to its parent. So the socket is
    // handed over as standard error, and `role` puts it back. The last argument only marks the process.
    let exec = "exec \"$0\" --ignored --exact guard::role --nocapture --skip \"$1\" 2>&1 >/dev/null";
    let own = std::env::current_exe().unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    GuardRequest {
        program: "/bin/sh".into(),
        arguments: vec!["-c".into(), exec.into(), text(&own), text(agent)],
        mountpoints: Vec::new(),
        limit,
    }
}

async fn start(path: &Path, limit: Duration) -> Guard {
    let agent = Agent::connect(path, HANG, HANG).await.unwrap();
    Guard::start(agent.into_socket().await.unwrap(), path, &request(path, limit)).await.unwrap()
}

/// The guard's process. It is started by [`start`].
#[test]
#[ignore = "the guard's process, started by the tests here"]
fn role() {
    rustix::stdio::dup2_stdout(std::io::stderr()).unwrap();
    let null = std::fs::File::options().write(true).open("/dev/null").unwrap();
    rustix::stdio::dup2_stderr(null).unwrap();
    let code = guard_main();
    std::process::exit(i32::from(code != std::process::ExitCode::SUCCESS));
}

/// A tool that freezes and then hangs, until somebody kills it. It is started by [`Tool::start`].
#[test]
#[ignore = "the process that is killed by the tests here"]
fn tool() {
    let path = PathBuf::from(std::env::var_os("GUARD_AGENT").unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut guard = start(&path, AMPLE).await;
        let frozen = guard.freeze().await.unwrap();
        eprintln!("frozen {}", frozen.filesystems);
        std::future::pending::<()>().await;
    });
}

struct Tool {
    child: Child,
}

impl Tool {
    fn start(guest: &Guest) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "guard::tool", "--nocapture"])
            .env("GUARD_AGENT", guest.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child }
    }

    fn wait_until_frozen(&mut self) {
        let lines = BufReader::new(self.child.stderr.as_mut().unwrap()).lines();
        let line = lines.map_while(Result::ok).find(|line| line.starts_with("frozen"));
        assert_eq!(line.as_deref(), Some("frozen 2"));
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), signal).unwrap();
}

/// State and CPU time in clock ticks, or none for a process that has ended. Source: proc(5), /proc/pid/stat.
fn stat(pid: u32) -> Option<(char, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?;
    // The first thread is a zombie before the others have let go of what they share: the guard runs in one of
    // the test harness's threads here.
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    Some((fields[0].chars().next()?, ticks)).filter(|(state, _)| *state != 'Z' || threads > 1)
}

/// Waits until a process has ended.
fn ends(pid: u32) {
    let limit = Instant::now() + HANG;
    while stat(pid).is_some() {
        assert!(Instant::now() < limit, "process {pid} lives on");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The commands from the freeze on.
fn since_freeze(log: &[String]) -> Vec<&str> {
    log.iter().map(String::as_str).skip_while(|entry| *entry != FREEZE).collect()
}

fn not_frozen(result: Result<agent_client::Frozen, GuardError>) -> String {
    match result {
        Err(GuardError::NotFrozen { reason }) => reason,
        other => panic!("{other:?}"),
    }
}

/// Freezes a guest whose agent answers the freeze with `answer`: it must be refused, and a thaw must follow.
async fn refused(answer: impl Fn() -> Vec<Act> + Send + 'static) -> (String, Vec<String>) {
    let guest = Guest::new(move |command, _| if command == FREEZE { answer() } else { well(command) });
    let reason = not_frozen(guest.start(AMPLE).await.freeze().await);
    assert_eq!(since_freeze(&guest.log())[1..3], [SYNC, THAW]);
    (reason, guest.log())
}

#[tokio::test]
async fn g1_freeze_and_thaw() {
    let guest = Guest::new(|command, _| well(command));
    let mut guard = guest.start(AMPLE).await;
    let pid = guest.guard();
    let frozen = guard.freeze().await.unwrap();
    assert_eq!(frozen.filesystems, 2);
    assert!(frozen.sent_ns <= frozen.confirmed_ns && guard.holds());
    let thawed = guard.thaw().await.unwrap();
    assert!(thawed.filesystems == Some(2) && !thawed.expired && thawed.sent_ns >= frozen.confirmed_ns);
    assert_eq!(since_freeze(&guest.wait_for("hung up", 1)), [FREEZE, THAW, "hung up"]);
    ends(pid);
}

#[tokio::test]
async fn g6_chosen_mount_points_are_frozen() {
    let guest = Guest::new(|command, _| match command {
        "guest-fsfreeze-freeze-list" => reply("1"),
        other => well(other),
    });
    let agent = guest.agent().await;
    let mut request = request(&guest.path(), AMPLE);
    request.mountpoints = vec!["/srv/\u{1b}\"é".into()];
    let mut guard = Guard::start(agent.into_socket().await.unwrap(), &guest.path(), &request).await.unwrap();
    assert_eq!(guard.freeze().await.unwrap().filesystems, 1);
    assert_eq!(guard.thaw().await.unwrap().filesystems, Some(2));
}

#[tokio::test]
async fn g7_no_file_system_is_said_so() {
    let guest = Guest::new(|command, _| if command == FREEZE { reply("0") } else { well(command) });
    let mut guard = guest.start(AMPLE).await;
    assert_eq!(guard.freeze().await.unwrap().filesystems, 0);
    guard.thaw().await.unwrap();
}

#[test]
fn g1_a_tool_killed_while_it_freezes() {
    let guest = Guest::new(|command, _| if command == FREEZE { Vec::new() } else { well(command) });
    let tool = Tool::start(&guest);
    guest.wait_for(FREEZE, 1);
    let guard = guest.guard();
    tool.kill();
    let log = guest.wait_for("hung up", 1);
    assert_eq!(since_freeze(&log), [FREEZE, SYNC, THAW, "hung up"]);
    ends(guard);
}

#[test]
fn g1_a_tool_killed_while_the_guest_is_frozen() {
    let guest = Guest::new(|command, _| well(command));
    let mut tool = Tool::start(&guest);
    tool.wait_until_frozen();
    let guard = guest.guard();
    tool.kill();
    let log = guest.wait_for("hung up", 1);
    assert_eq!(since_freeze(&log), [FREEZE, SYNC, THAW, "hung up"]);
    ends(guard);
}

#[tokio::test]
async fn g1_a_guard_let_go_before_the_freeze_ends() {
    let guest = Guest::new(|command, _| well(command));
    let guard = guest.start(AMPLE).await;
    let pid = guest.guard();
    drop(guard);
    let log = guest.wait_for("hung up", 1);
    assert_eq!(log, [SYNC, "hung up"]);
    ends(pid);
}

#[tokio::test]
async fn g1_a_guard_let_go_in_the_window_thaws() {
    let guest = Guest::new(|command, _| well(command));
    let mut guard = guest.start(AMPLE).await;
    guard.freeze().await.unwrap();
    drop(guard);
    assert_eq!(since_freeze(&guest.wait_for("hung up", 1)), [FREEZE, SYNC, THAW, "hung up"]);
}

#[tokio::test]
async fn g1_a_freeze_that_nobody_waits_for_any_more_is_thawed() {
    let guest = Guest::new(|command, _| if command == FREEZE { Vec::new() } else { well(command) });
    let mut guard = guest.start(AMPLE).await;
    tokio::select! {
        frozen = guard.freeze() => panic!("{frozen:?}"),
        () = async { while !guest.log().iter().any(|entry| entry == FREEZE) { tokio::task::yield_now().await } } => {}
    }
    let thawed = guard.thaw().await.unwrap();
    assert_eq!(thawed.filesystems, Some(2));
    assert_eq!(since_freeze(&guest.log())[..3], [FREEZE, SYNC, THAW]);
}

#[tokio::test]
async fn g2_the_limit_passes() {
    let guest = Guest::new(|command, _| well(command));
    let mut guard = guest.start(SHORT).await;
    guard.freeze().await.unwrap();
    let log = guest.wait_for(THAW, 1);
    assert_eq!(since_freeze(&log), [FREEZE, SYNC, THAW]);
    // The guard tells once the agent has answered.
    while guard.holds() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let thawed = guard.thaw().await.unwrap();
    assert!(thawed.expired && thawed.filesystems == Some(2));
}

#[tokio::test]
async fn g2_a_freeze_that_is_answered_after_the_limit() {
    // An agent that is busy freezing reads nothing: the answer comes when the thaw is behind it already.
    let guest = Guest::new(|command, _| match command {
        FREEZE => Vec::new(),
        SYNC => [reply("2"), echo()].into_iter().flatten().collect(),
        other => well(other),
    });
    // Its first sync is answered likewise: with something stale before.
    let reason = not_frozen(guest.start(SHORT).await.freeze().await);
    assert!(reason.contains("did not confirm the freeze within 300ms"), "{reason}");
    assert_eq!(since_freeze(&guest.log())[..3], [FREEZE, SYNC, THAW]);
}

#[tokio::test]
async fn g5_a_freeze_that_is_refused_is_thawed_too() {
    let (reason, _) = refused(|| refuse("failed to freeze \\u001b[2J/srv")).await;
    assert_eq!(reason, "failed to freeze \\u{1b}[2J/srv");
}

#[tokio::test]
async fn g7_answers_that_are_no_count() {
    for answer in ["-1", "\"5\"", "null", "2.5", "[2]", "{}", "true", "18446744073709551616"] {
        let (reason, _) = refused(move || reply(answer)).await;
        assert!(
            reason.contains("the agent answered") && reason.contains(answer.trim_matches('"')),
            "{reason}"
        );
    }
}

#[tokio::test]
async fn g11_answers_that_are_no_replies() {
    for garbage in [
        "Segmentation fault\u{1b}[0m\n",
        "{}\n",
        "}\n",
        "{\"return\": 2, \"return\": 3}\n",
        "{\"event\": \"X\"}\n",
    ] {
        let (reason, _) = refused(move || vec![Act::Send(garbage.into())]).await;
        assert!(reason.contains("the agent answered `"), "{reason}");
        assert!(!reason.contains(char::is_control), "{reason:?}");
    }
}

#[tokio::test]
async fn g11_an_answer_of_17_mebibytes() {
    let (reason, _) =
        refused(|| vec![Act::Send(b"{\"return\": \"".to_vec()), Act::Flood(b"0123456789abcdef", 17 << 16)])
            .await;
    assert!(reason.contains("more than 16777216 bytes"), "{reason}");
}

#[tokio::test]
async fn g11_an_answer_that_would_be_much_memory() {
    let (reason, _) =
        refused(|| vec![Act::Send(b"{\"return\": [".to_vec()), Act::Flood(b"{\"\":0},", 1 << 20)]).await;
    assert!(reason.contains("values"), "{reason}");
}

#[tokio::test]
async fn g11_a_flood_stops_no_deadline() {
    let guest = Guest::new(|command, _| match command {
        // It goes on until nobody listens any more, or for 2 GiB.
        FREEZE => [reply("2"), vec![Act::Flood(b"{\"event\": \"X\"}\n{}\ngarbage\n", 80 << 20)]]
            .into_iter()
            .flatten()
            .collect(),
        other => well(other),
    });
    let mut guard = guest.start(SHORT).await;
    let pid = guest.guard();
    guard.freeze().await.unwrap();
    // The agent reads nothing while it floods, so the guard can only say that the time is over.
    let limit = Instant::now() + HANG;
    while guard.holds() {
        assert!(Instant::now() < limit, "the flood holds up the deadline");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    signal(pid, Signal::KILL);
}

#[tokio::test]
async fn g3_a_socket_that_breaks_in_the_window_is_connected_again() {
    let guest = Guest::new(|command, earlier| match (command, earlier) {
        (FREEZE, _) => [reply("2"), vec![Act::HangUp]].into_iter().flatten().collect(),
        (other, _) => well(other),
    });
    let mut guard = guest.start(AMPLE).await;
    guard.freeze().await.unwrap();
    let log = guest.wait_for(THAW, 1);
    assert_eq!(since_freeze(&log)[..4], [FREEZE, "hung up", SYNC, THAW]);
    assert!(!guard.holds());
    let thawed = guard.thaw().await.unwrap();
    assert!(thawed.expired, "the freeze was not held until the thaw was asked for");
}

#[tokio::test]
async fn g3_a_socket_that_breaks_while_it_freezes() {
    let guest = Guest::new(|command, _| if command == FREEZE { vec![Act::HangUp] } else { well(command) });
    let reason = not_frozen(guest.start(AMPLE).await.freeze().await);
    assert!(reason.contains("socket was closed"), "{reason}");
    assert_eq!(since_freeze(&guest.log())[..4], [FREEZE, "hung up", SYNC, THAW]);
}

#[tokio::test]
async fn g3_an_agent_that_is_gone_for_good() {
    let guest = Guest::new(|command, _| match command {
        FREEZE => [reply("2"), vec![Act::Leave]].into_iter().flatten().collect(),
        other => well(other),
    });
    let mut guard = guest.start(AMPLE).await;
    let pid = guest.guard();
    guard.freeze().await.unwrap();
    guest.wait_for("left", 1);
    let fault = guard.thaw().await.unwrap_err();
    assert!(matches!(fault, GuardError::Gone), "{fault:?}");
    ends(pid);
}

#[tokio::test]
async fn g3_an_agent_that_is_gone_before_the_freeze() {
    let guest = Guest::new(|command, earlier| match (command, earlier) {
        (SYNC, _) => [echo(), vec![Act::Leave]].into_iter().flatten().collect(),
        (other, _) => well(other),
    });
    let agent = guest.agent().await;
    guest.wait_for("left", 1);
    let request = request(&guest.path(), AMPLE);
    let started = Guard::start(agent.into_socket().await.unwrap(), &guest.path(), &request).await;
    let fault = started.unwrap().freeze().await.unwrap_err();
    assert!(matches!(fault, GuardError::Gone), "{fault:?}");
}

#[tokio::test]
async fn g1_a_guard_killed_in_the_window() {
    let guest = Guest::new(|command, _| well(command));
    let mut guard = guest.start(AMPLE).await;
    guard.freeze().await.unwrap();
    let pid = guest.guard();
    signal(pid, Signal::KILL);
    ends(pid);
    assert!(!guard.holds());
    let thawed = guard.thaw().await.unwrap();
    assert!(thawed.filesystems == Some(2) && thawed.expired);
    assert_eq!(since_freeze(&guest.log())[..3], [FREEZE, SYNC, THAW]);
}

#[tokio::test]
async fn g1_a_guard_killed_while_it_freezes() {
    let guest = Guest::new(|command, _| match command {
        FREEZE => Vec::new(),
        SYNC => [reply("2"), echo()].into_iter().flatten().collect(),
        other => well(other),
    });
    let mut guard = guest.start(AMPLE).await;
    let pid = guest.guard();
    let kill = async {
        while !guest.log().iter().any(|entry| entry == FREEZE) {
            tokio::task::yield_now().await;
        }
        signal(pid, Signal::KILL);
    };
    let (frozen, ()) = tokio::join!(guard.freeze(), kill);
    assert!(not_frozen(frozen).contains("the thaw guard died"));
    assert_eq!(since_freeze(&guest.log())[..3], [FREEZE, SYNC, THAW]);
}

#[tokio::test]
async fn g4_without_its_guard_windows_may_have_thawed_too() {
    let guest = Guest::new(|command, _| match command {
        THAW => refuse("fsfreeze is limited up to 10 seconds"),
        other => well(other),
    });
    let mut guard = guest.start(AMPLE).await;
    guard.freeze().await.unwrap();
    let pid = guest.guard();
    signal(pid, Signal::KILL);
    ends(pid);
    let thawed = guard.thaw().await.unwrap();
    assert!(thawed.filesystems == Some(0) && thawed.expired);
}

#[tokio::test]
async fn g1_signals_to_the_guard_thaw() {
    for number in [Signal::TERM, Signal::INT, Signal::HUP] {
        let guest = Guest::new(|command, _| well(command));
        let mut guard = guest.start(AMPLE).await;
        guard.freeze().await.unwrap();
        let pid = guest.guard();
        signal(pid, number);
        let log = guest.wait_for(THAW, 1);
        assert_eq!(since_freeze(&log)[..3], [FREEZE, SYNC, THAW], "{number:?}");
        ends(pid);
        assert!(!guard.holds());
        let thawed = guard.thaw().await.unwrap();
        assert!(thawed.filesystems == Some(2) && thawed.expired, "{number:?}: {thawed:?}");
    }
}

#[tokio::test]
async fn g1_signals_to_the_guard_before_and_while_it_freezes() {
    let guest = Guest::new(|command, _| if command == FREEZE { Vec::new() } else { well(command) });
    let mut guard = guest.start(AMPLE).await;
    let pid = guest.guard();
    let stop = async {
        while !guest.log().iter().any(|entry| entry == FREEZE) {
            tokio::task::yield_now().await;
        }
        signal(pid, Signal::TERM);
    };
    let (frozen, ()) = tokio::join!(guard.freeze(), stop);
    assert!(not_frozen(frozen).contains("told to end"));
    drop(guard);

    // Many times, since a signal could slip in between a look and a wait.
    for _ in 0..20 {
        let guard = guest.start(AMPLE).await;
        let pid = guest.guard();
        signal(pid, Signal::TERM);
        ends(pid);
        drop(guard);
    }
    assert_eq!(guest.log().iter().filter(|entry| *entry == FREEZE).count(), 1);
}

#[tokio::test]
async fn g1_a_guard_that_ended_before_the_freeze() {
    let guest = Guest::new(|command, _| well(command));
    let mut guard = guest.start(AMPLE).await;
    let pid = guest.guard();
    signal(pid, Signal::TERM);
    ends(pid);
    assert!(not_frozen(guard.freeze().await).contains("the thaw guard died"));
    assert_eq!(guest.log()[..3], [SYNC, SYNC, THAW]);
}

#[tokio::test]
async fn g5_a_thaw_refused_once() {
    // The guard waits 1 s before it asks again.
    let guest = Guest::new(|command, earlier| match (command, earlier) {
        (THAW, 0) => refuse("busy"),
        (other, _) => well(other),
    });
    let mut guard = guest.start(AMPLE).await;
    guard.freeze().await.unwrap();
    let thawed = guard.thaw().await.unwrap();
    assert!(thawed.filesystems.is_none() && !thawed.expired);
    assert_eq!(since_freeze(&guest.log())[..4], [FREEZE, THAW, SYNC, THAW]);
}

#[tokio::test]
async fn g5_a_thaw_answered_with_garbage_is_asked_for_again() {
    // As above, 1 s.
    let garbage = ["{\"return\": \"done\"}\n", "{\"return\": -1}\n", "{\"return\": null}\n", "{\"x\": [[[\n"];
    let asked_again = async |garbage: &'static str| {
        let guest = Guest::new(move |command, earlier| match (command, earlier) {
            (THAW, 0) => vec![Act::Send(garbage.into())],
            (other, _) => well(other),
        });
        let mut guard = guest.start(AMPLE).await;
        guard.freeze().await.unwrap();
        assert_eq!(guard.thaw().await.unwrap().filesystems, None, "{garbage}");
    };
    let [a, b, c, d] = garbage.map(asked_again);
    tokio::join!(a, b, c, d);
}

#[tokio::test]
async fn g4_windows_has_thawed_by_itself() {
    let guest = Guest::new(|command, _| match command {
        THAW => refuse("fsfreeze is limited up to 10 seconds"),
        other => well(other),
    });
    let mut guard = guest.start(AMPLE).await;
    guard.freeze().await.unwrap();
    let thawed = guard.thaw().await.unwrap();
    assert!(
        thawed.filesystems == Some(0) && thawed.expired,
        "a freeze that was over is not a freeze that held"
    );
}

/// It takes all of [`THAW_GRACE`] (10 s) to say that a thaw is not confirmed, and 5 s more to the third one.
#[tokio::test]
async fn g2_a_thaw_that_is_not_confirmed_goes_on_without_the_tool() {
    let guest = Guest::new(|command, earlier| match (command, earlier) {
        (THAW, 0 | 1) => Vec::new(),
        (other, _) => well(other),
    });
    let mut guard = guest.start(AMPLE).await;
    guard.freeze().await.unwrap();
    let fault = guard.thaw().await.unwrap_err();
    let text = fault.to_string();
    let GuardError::ThawUnconfirmed { guard, reason } = fault else { panic!("{fault:?}") };
    assert!(reason.contains(&format!("{THAW_GRACE:?}")), "{reason}");
    assert_eq!(guard, guest.guard());
    assert!(text.contains(&format!("(pid {guard}) keeps trying")), "{text}");
    // 5 s after the first thaw, and 10 s after that; the third one is answered.
    let (_, ticks) = stat(guard).expect("the guard lives on");
    assert!(ticks < 50, "the guard spins: {ticks} ticks");
    guest.wait_for(THAW, 3);
    ends(guard);
}

/// As above, 10 s: without its guard the tool waits that long itself.
#[tokio::test]
async fn g2_a_thaw_that_nobody_can_confirm_any_more() {
    let guest = Guest::new(|command, earlier| match (command, earlier) {
        (FREEZE, _) => reply("2"),
        (SYNC, 0) => echo(),
        _ => Vec::new(),
    });
    let mut guard = guest.start(AMPLE).await;
    guard.freeze().await.unwrap();
    let pid = guest.guard();
    signal(pid, Signal::KILL);
    ends(pid);
    let fault = guard.thaw().await.unwrap_err();
    assert!(fault.to_string().ends_with("and the thaw guard is dead"), "{fault}");
    // Behind whatever the agent is busy with, there is a thaw.
    assert_eq!(since_freeze(&guest.log())[..3], [FREEZE, SYNC, THAW]);
}

/// The limit and [`THAW_GRACE`] (10 s) have to pass before a guard counts as hung.
#[tokio::test]
async fn g2_a_guard_that_is_stopped_while_it_freezes() {
    let guest = Guest::new(|command, _| match command {
        FREEZE => Vec::new(),
        SYNC => [reply("2"), echo()].into_iter().flatten().collect(),
        other => well(other),
    });
    let mut guard = guest.start(SHORT).await;
    let pid = guest.guard();
    let stop = async { signal(pid, Signal::STOP) };
    let (frozen, ()) = tokio::join!(guard.freeze(), stop);
    assert!(not_frozen(frozen).contains("the thaw guard hung"));
    ends(pid);
    guest.wait_for(THAW, 1);
}

#[tokio::test]
async fn g1_a_waiting_guard_costs_nothing() {
    let guest = Guest::new(|command, _| match command {
        FREEZE => [reply("2"), vec![Act::HangUp]].into_iter().flatten().collect(),
        THAW => Vec::new(),
        other => well(other),
    });
    let mut guard = guest.start(AMPLE).await;
    let pid = guest.guard();
    guard.freeze().await.unwrap();
    drop(guard);
    signal(pid, Signal::TERM);
    // The socket broke, the parent is gone, a signal came, and the thaw is not answered: each could keep it busy.
    guest.wait_for(THAW, 2);
    let (state, ticks) = stat(pid).unwrap();
    assert!(state == 'S' && ticks < 50, "the guard spins: {state}, {ticks} ticks");
    signal(pid, Signal::KILL);
}

#[tokio::test]
async fn a_program_that_is_no_guard() {
    let guest = Guest::new(|command, _| well(command));
    for program in ["/bin/false", "/bin/echo", "/nonexistent"] {
        let mut request = request(&guest.path(), AMPLE);
        request.program = program.into();
        let socket = guest.agent().await.into_socket().await.unwrap();
        let started = Guard::start(socket, &guest.path(), &request).await;
        assert!(matches!(started, Err(GuardError::Start { .. })), "{program}: {started:?}");
    }
    assert!(!guest.log().iter().any(|entry| entry == FREEZE));
}
