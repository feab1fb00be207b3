//! The QMP client: greeting, capabilities, commands.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use qapi_spec::Command;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::broadcast;
use tokio::time::timeout;

use crate::error::{CloseReason, Error, Excerpt};
use crate::frame::{Frame, Framer, Limits};
use crate::transport::{Connection, Event, Matching, Prepared, dial};

/// How long a monitor may take to greet. QEMU does it at once unless another client holds the monitor.
pub const GREETING_LIMIT: Duration = Duration::from_secs(2);
/// How long a command may take unless the caller says otherwise. QEMU answers in milliseconds, but its
/// main loop may wait for a slow disk.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// QEMU's version as its greeting gives it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Version {
    /// Major, minor and micro number.
    pub qemu: VersionTriple,
    /// The packager's words, for example `Debian 1:7.2+dfsg-7`, fit for a terminal.
    #[serde(default, deserialize_with = "crate::error::escaped")]
    pub package: String,
}

/// Three numbers of a version, in order of weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct VersionTriple {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub micro: u32,
}

impl std::fmt::Display for VersionTriple {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: GreetingBody,
}

#[derive(Deserialize)]
struct GreetingBody {
    version: Version,
}

/// A monitor of a running QEMU, ready for commands.
#[derive(Debug)]
pub struct Qmp {
    path: PathBuf,
    connection: Connection,
    version: Version,
    limit: Duration,
}

impl Qmp {
    /// Connects, takes the greeting and negotiates no capability.
    ///
    /// `limit` is for each later command; `patience` is for the greeting alone: how long to wait for
    /// another client to let go of the monitor.
    ///
    /// # Errors
    /// [`Error::Connect`]; [`Error::NoGreeting`] after `patience`; [`Error::NotQmp`] if something else
    /// answers.
    pub async fn connect(path: &Path, patience: Duration, limit: Duration) -> Result<Self, Error> {
        let connect = |source| Error::Connect { path: path.to_owned(), source };
        let begin = async {
            let mut stream = dial(path).await.map_err(connect)?;
            let greeting = read_greeting(&mut stream, path).await?;
            Ok::<_, Error>((stream, greeting))
        };
        let (stream, greeting) = match timeout(patience, begin).await {
            Ok(begun) => begun?,
            Err(_) => return Err(Error::NoGreeting { path: path.to_owned(), after: patience }),
        };
        let connection = Connection::over(stream, Limits::QMP, Matching::Id);
        connection.call::<()>("qmp_capabilities", None, Vec::new(), limit).await?;
        Ok(Self { path: path.to_owned(), connection, version: greeting.qmp.version, limit })
    }

    /// The socket's path, as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// QEMU's version.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// The process at the other end: the QEMU that made the socket, or whoever made it for QEMU.
    ///
    /// Source: unix(7), `SO_PEERCRED`.
    pub fn peer_pid(&self) -> Option<u32> {
        let credentials = self.connection.socket().peer_cred().ok()?;
        u32::try_from(credentials.pid()?).ok()
    }

    /// Runs a command whose name and types are fixed at compile time.
    ///
    /// # Errors
    /// As [`Connection::call`]; [`Error::Unexpected`] if the reply is of another shape.
    pub async fn execute<C: Command>(&self, command: &C) -> Result<C::Ok, Error> {
        let reply = self.connection.call(C::NAME, Some(command), Vec::new(), self.limit).await?;
        decode(C::NAME, &reply)
    }

    /// Runs a command by name, with `arguments` an object or null.
    ///
    /// # Errors
    /// As [`Connection::call`].
    pub async fn execute_raw(&self, command: &str, arguments: Value) -> Result<Box<RawValue>, Error> {
        let arguments = (!arguments.is_null()).then_some(arguments);
        self.connection.call(command, arguments, Vec::new(), self.limit).await
    }

    /// Runs a command that receives descriptors (`getfd`, `add-fd`), at most [`crate::MAX_FDS`] of them.
    ///
    /// # Errors
    /// As [`Connection::call`].
    pub async fn execute_with_fds(
        &self,
        command: &str,
        arguments: Value,
        fds: Vec<OwnedFd>,
    ) -> Result<Box<RawValue>, Error> {
        self.connection.call(command, Some(arguments), fds, self.limit).await
    }

    /// Sends all of a command but its last byte. See [`Connection::prepare`].
    ///
    /// # Errors
    /// As [`Connection::prepare`].
    pub async fn prepare<C: Command>(&self, command: &C) -> Result<Prepared, Error> {
        self.connection.prepare(C::NAME, Some(command), self.limit).await
    }

    /// Starts listening to events.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.connection.events()
    }

    /// What this QEMU can do, as [`Schema`]'s JSON text. It is some 200 KiB and the same for the life of a
    /// QEMU executable, so it is worth keeping.
    ///
    /// # Errors
    /// As [`Connection::call`].
    ///
    /// Source: qapi/introspect.json.
    pub async fn schema_text(&self) -> Result<String, Error> {
        let reply = self.execute_raw("query-qmp-schema", Value::Null).await?;
        Ok(Box::<str>::from(reply).into_string())
    }
}

/// Reads a typed value out of a reply.
///
/// # Errors
/// [`Error::Unexpected`] if the shape is another one.
pub fn decode<T: DeserializeOwned>(command: &str, reply: &RawValue) -> Result<T, Error> {
    serde_json::from_str(reply.get()).map_err(|fault| Error::Unexpected {
        command: command.to_owned(),
        detail: crate::error::printable(&fault.to_string(), 200),
        excerpt: Excerpt::of(reply.get().as_bytes()),
    })
}

async fn read_greeting(stream: &mut UnixStream, path: &Path) -> Result<Greeting, Error> {
    let not_qmp = |bytes: &[u8]| Error::NotQmp { path: path.to_owned(), excerpt: Excerpt::of(bytes) };
    let closed = |reason| Error::Closed { command: "the greeting".to_owned(), reason };
    // A greeting has some 200 bytes; nothing that follows it may be read here.
    let mut framer = Framer::new(Limits { message: 64 << 10, depth: 16, values: 1000 });
    let mut frames = Vec::new();
    while frames.is_empty() {
        let byte = stream.read_u8().await.map_err(|fault| match fault.kind() {
            std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset => {
                closed(CloseReason::Eof)
            }
            _ => closed(CloseReason::Io(fault.into())),
        })?;
        framer.push(&[byte], &mut frames).map_err(|exceeded| closed(exceeded.into()))?;
    }
    match frames.remove(0) {
        Frame::Message(bytes) => serde_json::from_slice(&bytes).map_err(|_| not_qmp(&bytes)),
        Frame::Sentinel => Err(not_qmp(b"\xff")),
    }
}
