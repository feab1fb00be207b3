//! One conversation over a unix socket: commands out, replies and events in.
//!
//! Two tasks own the socket. The reader cuts frames and gives each reply to the command that waits for
//! it; the writer sends whole commands one after another. So a caller may stop waiting at any moment (a
//! timeout, a dropped future) and leaves neither half a command nor a misread reply behind.
//!
//! A QMP monitor echoes a command's `id`, and its replies are matched by that. The agent answers in
//! order, and old ones refuse an `id`, so its replies are matched by their turn; after any doubt
//! [`Connection::sync`] throws away whatever is still under way.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::error::{CloseReason, Error, Excerpt, Refusal};
use crate::frame::{Frame, Framer, Limits, SENTINEL};

/// Events that wait for a slow reader before the oldest are dropped.
const EVENT_BACKLOG: usize = 1024;
/// Commands that wait for the writer.
const COMMAND_BACKLOG: usize = 64;
/// Bytes read at once.
const READ_SIZE: usize = 64 << 10;
/// Longest event that is passed on; QEMU's have some 200 bytes. With [`EVENT_BACKLOG`] it bounds what a flood
/// of them can hold.
const EVENT_SIZE: usize = 16 << 10;
/// Between two attempts to get into the queue of a socket that has many clients waiting.
const DIAL_AGAIN: Duration = Duration::from_millis(20);

/// How replies find their commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matching {
    /// By the `id` that the peer echoes (QMP).
    Id,
    /// By order (the guest agent).
    Order,
}

/// Something that the peer tells without being asked.
///
/// Source: docs/interop/qmp-spec.rst, "Asynchronous events".
#[derive(Clone, Debug, Deserialize)]
pub struct Event {
    /// The event's name; new QEMUs have names that nobody here knows.
    #[serde(rename = "event")]
    pub name: String,
    /// Its data as JSON, null where there is none.
    #[serde(default)]
    pub data: serde_json::Value,
}

/// One side of a conversation. Dropping it closes the socket.
#[derive(Debug)]
pub struct Connection {
    shared: Arc<Shared>,
    outgoing: mpsc::Sender<Outgoing>,
    tasks: [JoinHandle<()>; 2],
}

#[derive(Debug)]
struct Shared {
    stream: UnixStream,
    matching: Matching,
    next_id: AtomicU64,
    /// For [`Matching::Order`]: set from the start, and again when a caller goes away before its reply, until
    /// a sync is answered. Meanwhile messages that are no JSON are skipped: they are the rest of a reply that
    /// was meant for somebody else.
    in_doubt: AtomicBool,
    /// Set when somebody else goes on with the socket: ending the conversation must not shut it down.
    released: AtomicBool,
    state: Mutex<State>,
    events: broadcast::Sender<Event>,
}

#[derive(Debug, Default)]
struct State {
    waiting: HashMap<u64, Waiter>,
    /// Turns, for [`Matching::Order`]. A turn whose caller has gone stays: its reply still comes.
    order: VecDeque<u64>,
    closed: Option<CloseReason>,
}

type Reply = Result<Box<RawValue>, Refusal>;

#[derive(Debug)]
struct Waiter {
    tx: oneshot::Sender<Reply>,
    /// For `guest-sync-delimited`: the value that must come back, and whether the sentinel was seen.
    sync: Option<(u64, bool)>,
}

#[derive(Debug)]
enum Outgoing {
    Whole {
        bytes: Vec<u8>,
        fds: Vec<OwnedFd>,
    },
    /// All of a command but its last byte. `sent` fires when the kernel has it; `resume` ends the hold,
    /// with true if the last byte was sent.
    Held {
        bytes: Vec<u8>,
        sent: oneshot::Sender<()>,
        resume: oneshot::Receiver<bool>,
    },
}

#[derive(Deserialize)]
struct Incoming<'a> {
    #[serde(borrow, default, rename = "return", deserialize_with = "present")]
    value: Option<&'a RawValue>,
    error: Option<Refusal>,
    event: Option<&'a RawValue>,
    id: Option<&'a RawValue>,
}

/// A member that is there, even as null: `{"return": null}` is a reply.
fn present<'de: 'a, 'a, D: serde::Deserializer<'de>>(from: D) -> Result<Option<&'a RawValue>, D::Error> {
    Deserialize::deserialize(from).map(Some)
}

#[derive(Serialize)]
struct Request<'a, A> {
    execute: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    arguments: Option<A>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<u64>,
}

impl Connection {
    /// Connects to the socket at `path`.
    ///
    /// Being connected says little: a second client of the same QEMU chardev is accepted by the kernel and
    /// never served. Where even its queue is full, this waits until there is room, so give it a limit.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub async fn connect(path: &Path, limits: Limits, matching: Matching) -> Result<Self, Error> {
        let connect = |source| Error::Connect { path: path.to_owned(), source };
        let stream = dial(path).await.map_err(connect)?;
        Ok(Self::over(stream, limits, matching))
    }

    /// Takes over a connected socket.
    pub fn over(stream: UnixStream, limits: Limits, matching: Matching) -> Self {
        let shared = Arc::new(Shared {
            stream,
            matching,
            next_id: AtomicU64::new(1),
            in_doubt: AtomicBool::new(matching == Matching::Order),
            released: AtomicBool::new(false),
            state: Mutex::default(),
            events: broadcast::channel(EVENT_BACKLOG).0,
        });
        let (outgoing, queue) = mpsc::channel(COMMAND_BACKLOG);
        let reader = tokio::spawn(read_all(Arc::clone(&shared), limits));
        let writer = tokio::spawn(write_all(Arc::clone(&shared), queue));
        Self { shared, outgoing, tasks: [reader, writer] }
    }

    /// Starts listening to events. Only those that come from now on are seen.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.shared.events.subscribe()
    }

    /// Sends one command, with descriptors if any, and waits for its reply.
    ///
    /// # Errors
    /// [`Error::Timeout`] after `limit`, counted from now; [`Error::Refused`] if the peer says no;
    /// [`Error::Closed`] if the connection is or goes down; [`Error::Encode`]; [`Error::Local`] for more
    /// than [`MAX_FDS`] descriptors, with nothing sent.
    pub async fn call<A: Serialize>(
        &self,
        command: &str,
        arguments: Option<A>,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Box<RawValue>, Error> {
        if fds.len() > MAX_FDS {
            let what = format!("{command} cannot carry {} descriptors, {MAX_FDS} are the most", fds.len());
            return Err(Error::Local { what, source: io::ErrorKind::InvalidInput.into() });
        }
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let bytes = self.encode(command, arguments, id)?;
        let pending = self.register(command, id, None)?;
        tracing::debug!("{command}");
        self.finish(pending, Outgoing::Whole { bytes, fds }, limit).await
    }

    /// Sends all of a command but its last byte, and returns when the kernel has it.
    ///
    /// Until the result is fired or dropped, other commands on this connection wait.
    ///
    /// # Errors
    /// As [`Connection::call`].
    pub async fn prepare<A: Serialize>(
        &self,
        command: &str,
        arguments: Option<A>,
        limit: Duration,
    ) -> Result<Prepared, Error> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let mut bytes = self.encode(command, arguments, id)?;
        // The object's closing brace is what makes QEMU's parser hand the command over.
        bytes.truncate(bytes.len() - LAST.len());
        let pending = self.register(command, id, None)?;
        let (sent_tx, sent) = oneshot::channel();
        let (resume, resume_rx) = oneshot::channel();
        let held = Outgoing::Held { bytes, sent: sent_tx, resume: resume_rx };
        let send = async {
            self.outgoing.send(held).await.map_err(|_| pending.closed())?;
            sent.await.map_err(|_| pending.closed())
        };
        match timeout(limit, send).await {
            Ok(done) => done?,
            Err(_) => return Err(pending.timed_out(limit)),
        }
        Ok(Prepared { pending, resume: Some(resume), limit })
    }

    /// Makes the conversation start afresh: whatever the peer still had to say is skipped.
    ///
    /// # Errors
    /// As [`Connection::call`]; a timeout usually means that nobody serves the socket.
    ///
    /// Source: qga/qapi-schema.json, `guest-sync-delimited`.
    pub async fn sync(&self, value: u64, limit: Duration) -> Result<(), Error> {
        let command = "guest-sync-delimited";
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let mut bytes = vec![SENTINEL];
        bytes.extend(self.encode(command, Some(serde_json::json!({ "id": value })), id)?);
        let pending = self.register(command, id, Some(value))?;
        self.shared.in_doubt.store(true, Ordering::Relaxed);
        self.finish(pending, Outgoing::Whole { bytes, fds: Vec::new() }, limit).await.map(drop)
    }

    /// The socket itself, for its peer's credentials.
    pub fn socket(&self) -> &UnixStream {
        &self.shared.stream
    }

    /// Ends the conversation but not the socket, and gives the socket back. Replies that were still to
    /// come stay in it.
    ///
    /// # Errors
    /// If no descriptor is left; the socket is closed then.
    pub async fn into_socket(mut self) -> io::Result<StdUnixStream> {
        let socket = self.shared.stream.as_fd().try_clone_to_owned()?;
        for task in &mut self.tasks {
            task.abort();
            let _ = task.await;
        }
        self.shared.released.store(true, Ordering::Relaxed);
        Ok(socket.into())
    }

    fn encode<A: Serialize>(&self, command: &str, arguments: Option<A>, id: u64) -> Result<Vec<u8>, Error> {
        let id = (self.shared.matching == Matching::Id).then_some(id);
        let mut bytes = serde_json::to_vec(&Request { execute: command, arguments, id })
            .map_err(|source| Error::Encode { command: command.to_owned(), source })?;
        tracing::trace!("> {}", Excerpt::long(&bytes));
        bytes.push(b'\n');
        Ok(bytes)
    }

    fn register(&self, command: &str, id: u64, sync: Option<u64>) -> Result<Pending, Error> {
        let (tx, rx) = oneshot::channel();
        let mut state = self.shared.state();
        if let Some(reason) = &state.closed {
            return Err(Error::Closed { command: command.to_owned(), reason: reason.clone() });
        }
        state.waiting.insert(id, Waiter { tx, sync: sync.map(|value| (value, false)) });
        if self.shared.matching == Matching::Order {
            state.order.push_back(id);
        }
        Ok(Pending { shared: Arc::clone(&self.shared), command: command.to_owned(), id, rx })
    }

    async fn finish(
        &self,
        mut pending: Pending,
        outgoing: Outgoing,
        limit: Duration,
    ) -> Result<Box<RawValue>, Error> {
        let whole = async {
            self.outgoing.send(outgoing).await.map_err(|_| pending.closed())?;
            pending.reply().await
        };
        match timeout(limit, whole).await {
            Ok(reply) => reply,
            Err(_) => Err(pending.timed_out(limit)),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.close(CloseReason::Local);
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// A command that waits for its reply. Dropping it forgets the command: a late reply is ignored.
#[derive(Debug)]
struct Pending {
    shared: Arc<Shared>,
    command: String,
    id: u64,
    rx: oneshot::Receiver<Reply>,
}

impl Pending {
    async fn reply(&mut self) -> Result<Box<RawValue>, Error> {
        match (&mut self.rx).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(refusal)) => Err(Error::Refused { command: self.command.clone(), refusal }),
            Err(_) => Err(self.closed()),
        }
    }

    fn closed(&self) -> Error {
        // Before the reader has seen the end, the writer may: nobody reads on the other side.
        let reason = self.shared.state().closed.clone().unwrap_or(CloseReason::Eof);
        Error::Closed { command: self.command.clone(), reason }
    }

    fn timed_out(&self, after: Duration) -> Error {
        Error::Timeout { command: self.command.clone(), after }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let unanswered = self.shared.state().waiting.remove(&self.id).is_some();
        if unanswered && self.shared.matching == Matching::Order {
            self.shared.in_doubt.store(true, Ordering::Relaxed);
        }
    }
}

/// The last byte of a command and its line end.
const LAST: &[u8] = b"}\n";

/// A command that the peer has but for its last byte.
///
/// Dropping it makes the peer forget it: a 0xFF byte ends a half-sent command in QEMU 7.2 and 10.0 alike.
#[derive(Debug)]
pub struct Prepared {
    pending: Pending,
    resume: Option<oneshot::Sender<bool>>,
    limit: Duration,
}

impl Prepared {
    /// Sends the last byte and waits for the reply, for as long as [`Connection::prepare`] was given.
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::Closed`] and [`Error::Timeout`], after which the command may still be
    /// carried out: once the last byte is sent, nothing takes it back.
    pub async fn fire(mut self) -> Result<Box<RawValue>, Error> {
        let limit = self.limit;
        match timeout(limit, self.fire_at_once()).await {
            Ok(reply) => reply,
            Err(_) => Err(self.pending.timed_out(limit)),
        }
    }

    async fn fire_at_once(&mut self) -> Result<Box<RawValue>, Error> {
        // Written from here, not by the writer's task: nothing else may use the socket now, and a hop
        // to another task would be part of the guest's pause.
        let mut rest = LAST;
        while !rest.is_empty() {
            match self.pending.shared.stream.try_write(rest) {
                Ok(sent) => rest = &rest[sent..],
                Err(fault) if fault.kind() == io::ErrorKind::WouldBlock => {
                    let _ = self.pending.shared.stream.writable().await;
                }
                Err(fault) => {
                    self.pending.shared.close(CloseReason::Io(Arc::new(fault)));
                    return Err(self.pending.closed());
                }
            }
        }
        if let Some(resume) = self.resume.take() {
            let _ = resume.send(true);
        }
        self.pending.reply().await
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the conversation; the first reason stays. Everybody who waits hears of it.
    fn close(&self, reason: CloseReason) {
        let mut state = self.state();
        state.closed.get_or_insert(reason);
        state.waiting.clear();
        state.order.clear();
        drop(state);
        if !self.released.load(Ordering::Relaxed) {
            let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
        }
    }

    fn take_in(&self, frame: Frame) -> Result<(), CloseReason> {
        let bytes = match frame {
            Frame::Sentinel => {
                self.saw_sentinel();
                return Ok(());
            }
            Frame::Message(bytes) => bytes,
        };
        tracing::trace!("< {}", Excerpt::long(&bytes));
        let incoming: Incoming<'_> = match serde_json::from_slice(&bytes) {
            Ok(incoming) => incoming,
            Err(_) if self.in_doubt.load(Ordering::Relaxed) => return Ok(()),
            Err(_) => return Err(CloseReason::Malformed(Excerpt::of(&bytes))),
        };
        if incoming.event.is_some() {
            // An event that does not even have a name tells nobody anything.
            if let Some(event) = event(&bytes) {
                let _ = self.events.send(event);
            }
            return Ok(());
        }
        let reply = match (incoming.error, incoming.value) {
            (Some(refusal), _) => Err(refusal),
            (None, Some(value)) => Ok(value.to_owned()),
            // The greeting, or something newer than this program.
            (None, None) => return Ok(()),
        };
        self.deliver(incoming.id.and_then(|id| id.get().parse().ok()), reply);
        Ok(())
    }

    /// Gives a reply to whoever waits for it; one that nobody waits for is ignored.
    fn deliver(&self, id: Option<u64>, reply: Reply) {
        let mut state = self.state();
        let id = match self.matching {
            Matching::Id => id,
            Matching::Order => state.order.front().copied(),
        };
        let Some(id) = id else { return };
        if let Some(Waiter { sync: Some((value, seen)), .. }) = state.waiting.get(&id) {
            let echoed = reply.as_ref().ok().and_then(|raw| raw.get().parse::<u64>().ok());
            // Anything else, errors too, answers what was sent before: an agent complains about each 0xFF.
            if !*seen || echoed != Some(*value) {
                return;
            }
            self.in_doubt.store(false, Ordering::Relaxed);
        }
        if self.matching == Matching::Order {
            state.order.pop_front();
        }
        if let Some(waiter) = state.waiting.remove(&id) {
            let _ = waiter.tx.send(reply);
        }
    }

    /// Everything that was under way before the newest sync belongs to the past.
    fn saw_sentinel(&self) {
        let mut state = self.state();
        let is_sync = |id: &u64, state: &State| state.waiting.get(id).is_some_and(|w| w.sync.is_some());
        let Some(at) = state.order.iter().rposition(|id| is_sync(id, &state)) else { return };
        for stale in state.order.drain(..at).collect::<Vec<_>>() {
            state.waiting.remove(&stale);
        }
        if let Some(id) = state.order.front().copied()
            && let Some(Waiter { sync: Some((_, seen)), .. }) = state.waiting.get_mut(&id)
        {
            *seen = true;
        }
    }
}

/// Connects, and waits where the queue of the socket is full: its owner serves somebody else.
pub(crate) async fn dial(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(fault) if fault.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(DIAL_AGAIN).await,
            done => return done,
        }
    }
}

fn event(bytes: &[u8]) -> Option<Event> {
    if bytes.len() > EVENT_SIZE {
        tracing::debug!(bytes = bytes.len(), "an event is too long and was left out");
        return None;
    }
    serde_json::from_slice(bytes).ok()
}

async fn read_all(shared: Arc<Shared>, limits: Limits) {
    let mut framer = Framer::new(limits);
    let mut buffer = vec![0; READ_SIZE];
    let reason = loop {
        if let Err(fault) = shared.stream.readable().await {
            break CloseReason::Io(Arc::new(fault));
        }
        let bytes = match shared.stream.try_read(&mut buffer) {
            Ok(0) => break CloseReason::Eof,
            Ok(count) => &buffer[..count],
            Err(fault) if fault.kind() == io::ErrorKind::WouldBlock => continue,
            Err(fault) if fault.kind() == io::ErrorKind::ConnectionReset => break CloseReason::Eof,
            Err(fault) => break CloseReason::Io(Arc::new(fault)),
        };
        let mut frames = Vec::new();
        let pushed = framer.push(bytes, &mut frames);
        if let Err(reason) = frames.into_iter().try_for_each(|frame| shared.take_in(frame)) {
            break reason;
        }
        if let Err(exceeded) = pushed {
            break exceeded.into();
        }
        // A peer that never stops sending must not keep this thread from timers and other peers.
        tokio::task::yield_now().await;
    };
    shared.close(reason);
}

async fn write_all(shared: Arc<Shared>, mut queue: mpsc::Receiver<Outgoing>) {
    while let Some(outgoing) = queue.recv().await {
        let written = match outgoing {
            Outgoing::Whole { bytes, fds } => write(&shared.stream, &bytes, fds).await,
            Outgoing::Held { bytes, sent, resume } => write_held(&shared.stream, &bytes, sent, resume).await,
        };
        if let Err(fault) = written {
            // A peer that closed tells so by end of file; the reader has the better reason.
            if fault.kind() != io::ErrorKind::BrokenPipe {
                shared.close(CloseReason::Io(Arc::new(fault)));
            }
            return;
        }
    }
}

async fn write_held(
    stream: &UnixStream,
    bytes: &[u8],
    sent: oneshot::Sender<()>,
    resume: oneshot::Receiver<bool>,
) -> io::Result<()> {
    write(stream, bytes, Vec::new()).await?;
    let _ = sent.send(());
    match resume.await {
        Ok(true) => Ok(()),
        _ => write(stream, &[SENTINEL, b'\n'], Vec::new()).await,
    }
}

async fn write(stream: &UnixStream, mut bytes: &[u8], mut fds: Vec<OwnedFd>) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_io(Interest::WRITABLE, || send(stream, bytes, &fds)) {
            Ok(count) => {
                bytes = &bytes[count..];
                // Descriptors travel with the first byte.
                fds.clear();
            }
            Err(fault) if fault.kind() == io::ErrorKind::WouldBlock => {}
            Err(fault) => return Err(fault),
        }
    }
    Ok(())
}

/// Sends bytes with descriptors beside them.
///
/// Source: unix(7), `SCM_RIGHTS`; qapi/misc.json `getfd`, `add-fd`.
fn send(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<usize> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(sent)
}

/// Descriptors that one command can carry; QEMU takes 16 at once (chardev/char-socket.c `TCP_MAX_FDS`).
pub const MAX_FDS: usize = 16;
