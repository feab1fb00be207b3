//! The thaw guard's own process.
//!
//! Standard input is the agent's connected socket, standard output the socket to the parent. One thread,
//! one `poll`, no allocation that depends on what the guest sends beyond the agent's limits.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use super::is_forestalled;
use super::wire::{Order, Report, Task, now_ns};
use crate::agent::{freeze_command, sync_id};
use crate::error::{Excerpt, Refusal};
use crate::frame::{Frame, Framer, Limits, SENTINEL};

const SECOND: u64 = 1_000_000_000;
/// First wait before a thaw is sent again; it doubles each time. An agent may be busy syncing for long.
const FIRST_RETRY: u64 = 2 * SECOND;
/// The same where the stream is in step: the reply comes as soon as the guest is done, which may take long
/// on Windows, and a second thaw would make its count worthless.
const FIRST_RETRY_IN_STEP: u64 = 5 * SECOND;
/// The same where the agent has answered, and refused.
const REFUSED_RETRY: u64 = SECOND;
/// Longest wait between two thaws.
const LAST_RETRY: u64 = 30 * SECOND;
/// Between two attempts to connect again.
const RECONNECT: u64 = SECOND / 5;
/// Refused connections in a row after which QEMU counts as gone.
const GONE_AFTER: u32 = 5;

/// Runs the thaw guard until nothing can be frozen any more. Called by the executable that was started
/// with [`super::GuardRequest::arguments`].
pub fn guard_main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn run() -> io::Result<()> {
    // A session of its own: no terminal's Ctrl-C or hang-up reaches the guard.
    let _ = rustix::process::setsid();
    // Memory runs short just when much is snapshotted; root may ask to be spared.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let (signals, handler) = UnixStream::pair()?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT, signal_hook::consts::SIGHUP] {
        signal_hook::low_level::pipe::register(signal, handler.try_clone()?)?;
    }
    signals.set_nonblocking(true)?;
    let agent = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let parent = UnixStream::from(io::stdout().as_fd().try_clone_to_owned()?);
    agent.set_nonblocking(true)?;
    // Standard input and output would keep the sockets open beside the ones used here.
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;

    let mut parent = Parent { stream: parent, buffer: Vec::new(), open: true };
    let task: Task = serde_json::from_slice(&parent.line_blocking()?)?;
    parent.stream.set_nonblocking(true)?;
    parent.report(&Report::Ready);
    Process {
        framer: Framer::new(Limits::AGENT),
        agent: Some(agent),
        parent,
        task,
        phase: Phase::Idle,
        signals,
        told_to_end: false,
    }
    .run();
    Ok(())
}

struct Parent {
    stream: UnixStream,
    buffer: Vec<u8>,
    open: bool,
}

impl Parent {
    fn line_blocking(&mut self) -> io::Result<Vec<u8>> {
        let mut byte = [0];
        let mut line = Vec::new();
        while self.stream.read(&mut byte)? == 1 {
            match byte[0] {
                b'\n' => return Ok(line),
                other => line.push(other),
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    /// Orders that have arrived. Clears `open` when the parent is gone.
    fn orders(&mut self) -> Vec<Order> {
        let mut chunk = [0; 256];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => self.open = false,
                Ok(count) => {
                    self.buffer.extend_from_slice(&chunk[..count]);
                    continue;
                }
                Err(fault) if fault.kind() == io::ErrorKind::Interrupted => continue,
                Err(fault) => self.open &= fault.kind() == io::ErrorKind::WouldBlock,
            }
            break;
        }
        let mut orders = Vec::new();
        while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            orders.extend(serde_json::from_slice::<Order>(&line));
        }
        orders
    }

    fn report(&mut self, report: &Report) {
        let Ok(mut line) = serde_json::to_vec(report) else { return };
        line.push(b'\n');
        // A parent that is gone or stopped cannot be told; the thaw matters more.
        let _ = self.stream.write_all(&line);
    }
}

enum Phase {
    /// Nothing was sent yet.
    Idle,
    /// The freeze was sent and not answered.
    Freezing { sent: u64 },
    /// The freeze holds.
    Frozen { sent: u64 },
    /// A thaw was sent and not confirmed.
    Thawing(Thawing),
    /// Nothing can be frozen any more.
    Done,
}

struct Thawing {
    /// When the first thaw went out.
    first: u64,
    /// When the next one goes out.
    next: u64,
    wait: u64,
    expect: Expect,
    /// Whether it was sent more than once: which of them thawed what is not known then.
    repeated: bool,
    refused_connections: u32,
}

/// What the next message of the agent is.
#[derive(Clone, Copy, PartialEq)]
enum Expect {
    /// Part of what somebody asked before; skip to the sentinel.
    Sentinel,
    /// The echo of this sync.
    Echo(u64),
    /// The reply to the thaw.
    Thaw,
}

/// A reply. What it returns stays text: a guest's value can be many times its text in size.
#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(borrow, rename = "return")]
    value: Option<&'a RawValue>,
    error: Option<Refusal>,
}

impl Answer<'_> {
    /// Every reply that the guard waits for is a number that is not negative.
    fn number(&self) -> Option<u64> {
        self.value?.get().parse().ok()
    }
}

struct Process {
    framer: Framer,
    agent: Option<UnixStream>,
    parent: Parent,
    task: Task,
    phase: Phase,
    /// Readable once a signal told the guard to end. A flag alone would be overlooked if it were set between
    /// the look at it and the `poll`.
    signals: UnixStream,
    told_to_end: bool,
}

impl Process {
    fn run(&mut self) {
        while !matches!(self.phase, Phase::Done) {
            self.wait();
            self.hear_signals();
            self.hear_parent();
            self.hear_agent();
            self.look_at_clock();
        }
    }

    /// Sleeps until a socket or the clock has something to say.
    fn wait(&self) {
        let left = self.next_deadline().map(|at| at.saturating_sub(now_ns()));
        let timeout =
            left.map(|ns| Duration::from_nanos(ns).try_into().unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 }));
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        if self.parent.open {
            fds.push(PollFd::new(&self.parent.stream, PollFlags::IN));
        }
        if let Some(agent) = &self.agent {
            fds.push(PollFd::new(agent, PollFlags::IN));
        }
        // Why it ended does not matter: the loop looks at everything.
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
    }

    fn next_deadline(&self) -> Option<u64> {
        match &self.phase {
            Phase::Freezing { sent } | Phase::Frozen { sent } => {
                Some(sent.saturating_add(self.task.limit_ns))
            }
            Phase::Thawing(thawing) => Some(thawing.next),
            Phase::Idle | Phase::Done => None,
        }
    }

    fn hear_signals(&mut self) {
        // Whatever was said: once is enough, and emptied, or the next `poll` would not wait.
        while matches!(self.signals.read(&mut [0; 64]), Ok(count) if count > 0) {
            self.told_to_end = true;
        }
    }

    fn hear_parent(&mut self) {
        let orders = if self.parent.open { self.parent.orders() } else { Vec::new() };
        for order in orders {
            match (order, &self.phase) {
                (Order::Freeze, Phase::Idle) => self.freeze(),
                (Order::Thaw, Phase::Frozen { .. }) => self.thaw_at_once(),
                (Order::Thaw, Phase::Freezing { .. }) => self.thaw_behind(),
                (Order::Thaw, Phase::Idle) => self.phase = Phase::Done,
                (_, Phase::Thawing(_) | Phase::Done) | (Order::Freeze, _) => {}
            }
        }
        let alone = !self.parent.open || self.told_to_end;
        match &self.phase {
            Phase::Idle if alone => self.phase = Phase::Done,
            Phase::Freezing { .. } | Phase::Frozen { .. } if alone => {
                self.thaw_behind();
                self.parent.report(&Report::Failed { reason: "the thaw guard was told to end".into() });
            }
            _ => {}
        }
    }

    fn look_at_clock(&mut self) {
        if self.next_deadline().is_none_or(|at| now_ns() < at) {
            return;
        }
        match &self.phase {
            Phase::Freezing { .. } | Phase::Frozen { .. } => {
                self.thaw_behind();
                self.parent.report(&Report::Expired);
            }
            Phase::Thawing(_) => self.thaw_again(),
            Phase::Idle | Phase::Done => {}
        }
    }

    fn freeze(&mut self) {
        let (command, arguments) = freeze_command(&self.task.mountpoints);
        let sent = now_ns();
        self.phase = Phase::Freezing { sent };
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        if let Err(fault) = self.send(format!("{request}\n").as_bytes()) {
            self.failed(format!("the freeze could not be sent: {fault}"));
        }
    }

    /// The usual way: the stream is in step, so the thaw goes out bare.
    fn thaw_at_once(&mut self) {
        self.start_thawing(Expect::Thaw);
        let _ = self.send(b"{\"execute\":\"guest-fsfreeze-thaw\"}\n");
    }

    /// The careful way: a sync before the thaw, so that its reply cannot be taken for another one. The
    /// agent works in order, so it also undoes a freeze that is still to come.
    fn thaw_behind(&mut self) {
        self.start_thawing(Expect::Sentinel);
        self.send_sync_and_thaw();
    }

    fn start_thawing(&mut self, expect: Expect) {
        let first = now_ns();
        let wait = if expect == Expect::Thaw { FIRST_RETRY_IN_STEP } else { FIRST_RETRY };
        let next = first + wait;
        let (repeated, refused_connections) = (false, 0);
        self.phase = Phase::Thawing(Thawing { first, next, wait, expect, repeated, refused_connections });
    }

    fn send_sync_and_thaw(&mut self) {
        let id = sync_id();
        let sync = json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } });
        let mut bytes = vec![SENTINEL];
        bytes.extend_from_slice(format!("{sync}\n{{\"execute\":\"guest-fsfreeze-thaw\"}}\n").as_bytes());
        if let Phase::Thawing(thawing) = &mut self.phase {
            thawing.expect = Expect::Echo(id);
        }
        // What cannot be sent now, because the agent reads nothing, is sent by the next attempt.
        let _ = self.send(&bytes);
    }

    fn thaw_again(&mut self) {
        let reconnected = self.agent.is_none() && self.reconnect();
        let Phase::Thawing(thawing) = &mut self.phase else { return };
        if self.agent.is_none() {
            thawing.next = now_ns() + RECONNECT;
            return;
        }
        thawing.wait = if reconnected { FIRST_RETRY } else { (thawing.wait * 2).min(LAST_RETRY) };
        thawing.next = now_ns() + thawing.wait;
        thawing.repeated = true;
        self.send_sync_and_thaw();
    }

    fn reconnect(&mut self) -> bool {
        let connected = connect(&self.task.agent);
        let Phase::Thawing(thawing) = &mut self.phase else { return false };
        match connected {
            Ok(stream) => {
                self.framer = Framer::new(Limits::AGENT);
                self.agent = Some(stream);
                thawing.refused_connections = 0;
                true
            }
            Err(fault) if is_absent(&fault) => {
                thawing.refused_connections += 1;
                if thawing.refused_connections >= GONE_AFTER {
                    self.end(&Report::Gone);
                }
                false
            }
            // The socket's queue is full, or this process has no descriptor left: not for ever.
            Err(_) => false,
        }
    }

    fn hear_agent(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        let mut chunk = [0; 16 << 10];
        let count = match agent.read(&mut chunk) {
            Ok(count) => count,
            Err(fault) if matches!(fault.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return;
            }
            Err(_) => 0,
        };
        if count == 0 {
            return self.agent_closed();
        }
        let mut frames = Vec::new();
        let pushed = self.framer.push(&chunk[..count], &mut frames);
        for frame in frames {
            self.hear(&frame);
        }
        if let Err(exceeded) = pushed {
            // What follows is the rest of a monster; the next sentinel ends it.
            self.framer = Framer::new(Limits::AGENT);
            self.failed(exceeded.to_string());
        }
    }

    fn agent_closed(&mut self) {
        self.agent = None;
        match &mut self.phase {
            Phase::Idle | Phase::Done => self.end(&Report::Gone),
            Phase::Freezing { .. } | Phase::Frozen { .. } => {
                self.start_thawing(Expect::Sentinel);
                self.parent.report(&Report::Failed { reason: "the agent's socket was closed".into() });
                self.retry_soon();
            }
            Phase::Thawing(_) => self.retry_soon(),
        }
    }

    fn retry_soon(&mut self) {
        if let Phase::Thawing(thawing) = &mut self.phase {
            thawing.next = now_ns() + RECONNECT;
        }
    }

    fn hear(&mut self, frame: &Frame) {
        match (&mut self.phase, frame) {
            (Phase::Freezing { sent }, Frame::Message(bytes)) => {
                let sent = *sent;
                self.freeze_answered(sent, bytes);
            }
            (Phase::Thawing(thawing), Frame::Message(bytes)) => match thawing.expect {
                Expect::Sentinel => {}
                Expect::Echo(id) => {
                    let answer: Option<Answer<'_>> = serde_json::from_slice(bytes).ok();
                    if answer.and_then(|answer| answer.number()) == Some(id) {
                        thawing.expect = Expect::Thaw;
                    }
                }
                Expect::Thaw => self.thaw_answered(bytes),
            },
            _ => {}
        }
    }

    fn freeze_answered(&mut self, sent: u64, bytes: &[u8]) {
        let answer: Option<Answer<'_>> = serde_json::from_slice(bytes).ok();
        match answer {
            Some(Answer { error: Some(refusal), .. }) => self.failed(refusal.desc),
            Some(answer) if answer.number().is_some() => {
                let filesystems = answer.number().unwrap_or(0);
                self.phase = Phase::Frozen { sent };
                self.parent.report(&Report::Frozen { filesystems, sent_ns: sent, confirmed_ns: now_ns() });
            }
            _ => self.failed(format!("the agent answered {}", Excerpt::of(bytes))),
        }
    }

    fn thaw_answered(&mut self, bytes: &[u8]) {
        let Phase::Thawing(Thawing { first: sent_ns, repeated, .. }) = self.phase else { return };
        let answer: Option<Answer<'_>> = serde_json::from_slice(bytes).ok();
        match answer {
            Some(answer) if answer.error.is_none() && answer.number().is_some() => {
                let filesystems = answer.number().filter(|_| !repeated);
                self.end(&Report::Thawed { filesystems, sent_ns, confirmed_ns: now_ns() });
            }
            Some(Answer { error: Some(refusal), .. }) if is_forestalled(&refusal) => {
                self.parent.report(&Report::Expired);
                self.end(&Report::Thawed { filesystems: Some(0), sent_ns, confirmed_ns: now_ns() });
            }
            _ => {
                if let Phase::Thawing(thawing) = &mut self.phase {
                    thawing.expect = Expect::Sentinel;
                    thawing.next = thawing.next.min(now_ns() + REFUSED_RETRY);
                }
            }
        }
    }

    /// The freeze went wrong: thaw behind it, then say so.
    fn failed(&mut self, reason: String) {
        if matches!(self.phase, Phase::Freezing { .. }) {
            self.thaw_behind();
            self.parent.report(&Report::Failed { reason });
        }
    }

    fn end(&mut self, report: &Report) {
        self.phase = Phase::Done;
        self.parent.report(report);
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.agent {
            Some(agent) => agent.write_all(bytes),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// Connects without waiting for room in the socket's queue: a listener that accepts nobody must not hold up
/// the look at the clock and at signals.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket.into())
}

/// Whether nobody listens there any more, as opposed to not just now.
fn is_absent(fault: &io::Error) -> bool {
    matches!(fault.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// An agent that says `bytes` in and after a freeze, for the fuzzer and the property test below. The first
/// byte chooses how they arrive and what the parent does meanwhile; a byte 1 stands for the newest sync's value.
///
/// # Panics
/// If the guard broke a promise: that it thaws behind each freeze, and that it ends only after that.
#[cfg(any(test, feature = "fuzzing"))]
pub fn fuzz_guard(bytes: &[u8]) {
    simulation::run(bytes);
}

#[cfg(any(test, feature = "fuzzing"))]
#[allow(clippy::expect_used, clippy::panic, reason = "a broken promise has to stop the fuzzer")]
mod simulation {
    use super::*;

    const FREEZE: &str = "{\"execute\":\"guest-fsfreeze-freeze\"}\n";
    const THAW: &str = "guest-fsfreeze-thaw";
    /// Kept below what a socket takes at once, since one thread plays all the parts.
    const MOST: usize = 32 << 10;

    struct Guest {
        stream: UnixStream,
        heard: String,
    }

    impl Guest {
        fn hear(&mut self) {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = self.stream.read(&mut chunk) {
                self.heard.push_str(&String::from_utf8_lossy(&chunk[..count]));
            }
        }

        fn newest_sync(&self) -> &str {
            let after = self.heard.rsplit_once("\"id\":").map_or("0", |(_, after)| after);
            after.split(|c: char| !c.is_ascii_digit()).next().unwrap_or("0")
        }

        fn say(&mut self, chunk: &[u8]) {
            self.hear();
            let mut out = Vec::new();
            for byte in chunk {
                match byte {
                    1 => out.extend_from_slice(self.newest_sync().as_bytes()),
                    other => out.push(*other),
                }
            }
            self.stream.write_all(&out[..out.len().min(MOST)]).expect("the guard reads");
        }
    }

    fn pair() -> (UnixStream, UnixStream) {
        let (one, other) = UnixStream::pair().expect("a socket pair");
        for end in [&one, &other] {
            end.set_nonblocking(true).expect("a socket");
        }
        (one, other)
    }

    pub fn run(bytes: &[u8]) {
        let Some((how, said)) = bytes.split_first() else { return };
        let ((agent, guest), (parent, tool), (signals, _handler)) = (pair(), pair(), pair());
        let mut guest = Guest { stream: guest, heard: String::new() };
        let mut tool = Some(tool);
        let task = Task { agent: "/nonexistent/qga".into(), mountpoints: Vec::new(), limit_ns: u64::MAX };
        let mut process = Process {
            framer: Framer::new(Limits::AGENT),
            agent: Some(agent),
            parent: Parent { stream: parent, buffer: Vec::new(), open: true },
            task,
            phase: Phase::Idle,
            signals,
            told_to_end: false,
        };
        order(tool.as_ref(), b"\"freeze\"\n");
        process.hear_parent();
        let said = &said[..said.len().min(MOST)];
        let chunks: Vec<&[u8]> = said.chunks(1 + usize::from(how >> 3) * 16).collect();
        for (number, chunk) in chunks.iter().enumerate() {
            if number == chunks.len() / 2 {
                match how & 3 {
                    1 => order(tool.as_ref(), b"\"thaw\"\n"),
                    2 => tool = None,
                    3 => process.told_to_end = true,
                    _ => {}
                }
                process.hear_parent();
            }
            guest.say(chunk);
            process.hear_agent();
            if matches!(process.phase, Phase::Done) {
                break;
            }
        }
        check(&process, &mut guest, tool.as_ref());
        go_away(process, guest);
    }

    fn order(tool: Option<&UnixStream>, line: &[u8]) {
        if let Some(mut tool) = tool {
            tool.write_all(line).expect("the guard listens");
        }
    }

    fn check(process: &Process, guest: &mut Guest, tool: Option<&UnixStream>) {
        guest.hear();
        let after = guest.heard.strip_prefix(FREEZE).expect("the freeze went out first, and whole");
        let thawed = after.contains(THAW);
        let reports = tool.map(reports).unwrap_or_default();
        match &process.phase {
            Phase::Idle => panic!("a freeze was sent and forgotten"),
            Phase::Freezing { .. } => assert!(!thawed && reports.is_empty()),
            Phase::Frozen { .. } => {
                assert!(!thawed && (tool.is_none() || matches!(reports[..], [Report::Frozen { .. }])));
            }
            Phase::Thawing(_) => assert!(thawed),
            Phase::Done => {
                assert!(thawed, "it ended without a thaw: {reports:?}");
                assert!(tool.is_none() || matches!(reports.last(), Some(Report::Thawed { .. })));
            }
        }
    }

    fn reports(mut tool: &UnixStream) -> Vec<Report> {
        let mut text = Vec::new();
        let _ = tool.read_to_end(&mut text);
        let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines.map(|line| serde_json::from_slice(line).expect("a report is one line of JSON")).collect()
    }

    /// QEMU ends: so does the guard, in as many looks as it has promised.
    fn go_away(mut process: Process, guest: Guest) {
        drop(guest);
        while process.agent.is_some() && !matches!(process.phase, Phase::Done) {
            process.hear_agent();
        }
        for _ in 0..GONE_AFTER {
            if let Phase::Thawing(thawing) = &mut process.phase {
                thawing.next = 0;
            }
            process.look_at_clock();
        }
        assert!(matches!(process.phase, Phase::Done), "QEMU is gone, and the guard is not");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Words that a guard listens to, whole and broken, so that more than the first state is reached.
    fn word() -> impl Strategy<Value = Vec<u8>> {
        let whole: &[&[u8]] = &[
            b"{\"return\": 2}\n",
            b"{\"return\": 0}\n",
            b"{\"return\": -1}\n",
            b"{\"return\": null}\n",
            b"{\"return\": \x01}\n",
            b"\xff{\"return\": \x01}\n",
            b"\xff{\"return\": \x01}\n{\"return\": 2}\n",
            b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"fsfreeze is limited up to 10 seconds\"}}\n",
            b"{\"error\": {\"desc\": \"no\"}}\n",
            b"{\"error\": 5}\n",
            b"{\"return\": [{",
            b"garbage\n",
            b"\xff",
            b"{}",
            b"\n",
        ];
        prop_oneof![
            8 => prop::sample::select(whole).prop_map(<[u8]>::to_vec),
            1 => prop::collection::vec(any::<u8>(), 0..20),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn g11_whatever_the_agent_says_a_thaw_follows_the_freeze(
            how in any::<u8>(),
            words in prop::collection::vec(word(), 0..12),
        ) {
            fuzz_guard(&[vec![how], words.concat()].concat());
        }
    }
}
