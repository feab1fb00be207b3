//! The guest agent client.
//!
//! What comes from here is the guest's word: bounded, typed, and never used to decide which file or
//! device of the host is touched.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::sync::{Mutex, OnceCell};
use tokio::time::{Instant, timeout_at};

use crate::error::{Error, printable};
use crate::frame::Limits;
use crate::qmp::decode;
use crate::transport::{Connection, Matching};

/// How long an agent may take to answer a sync. It needs milliseconds; one that is not there never will.
pub const SYNC_LIMIT: Duration = Duration::from_secs(3);
/// How long any other command may take unless the caller says otherwise.
pub const AGENT_COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// The largest number that every JSON reader keeps exactly.
const MAX_SYNC_ID: u64 = (1 << 53) - 1;
/// Most list items that are taken from a guest; more are left out.
pub const MAX_ITEMS: usize = 4096;
/// Between two looks at a program that runs in the guest.
const EXEC_POLL: Duration = Duration::from_millis(5);

/// A guest agent that answered a sync.
#[derive(Debug)]
pub struct Agent {
    path: PathBuf,
    connection: Connection,
    /// Set while a command is under way; it stays set where its caller went away.
    unsettled: AtomicBool,
    /// One command at a time: the agent does one at a time anyway, and order is all that matches replies.
    turn: Mutex<()>,
    info: OnceCell<AgentInfo>,
    limit: Duration,
}

/// What an agent says of itself.
///
/// Source: qga/qapi-schema.json, GuestAgentInfo.
#[derive(Clone, Debug, Serialize)]
pub struct AgentInfo {
    /// Its version, as text.
    pub version: String,
    /// Its commands by name; true where enabled.
    pub commands: BTreeMap<String, bool>,
}

/// Whether file systems are frozen, as far as the agent remembers. The kernel may know better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FreezeStatus {
    /// The agent holds no freeze.
    Thawed,
    /// The agent froze and has not thawed.
    Frozen,
}

/// One mounted file system. Source: qga/qapi-schema.json, GuestFilesystemInfo.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Filesystem {
    /// The device's name in the guest.
    #[serde(default)]
    pub name: String,
    /// Where it is mounted.
    #[serde(default)]
    pub mountpoint: String,
    /// Its type, for example `ext4`.
    #[serde(default, rename(deserialize = "type"))]
    pub kind: String,
    /// Bytes in use, where known.
    #[serde(rename(deserialize = "used-bytes"))]
    pub used_bytes: Option<u64>,
    /// Size in bytes, where known.
    #[serde(rename(deserialize = "total-bytes"))]
    pub total_bytes: Option<u64>,
}

/// One network interface of the guest. Source: qga/qapi-schema.json, GuestNetworkInterface.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct GuestInterface {
    /// Its name in the guest.
    #[serde(default)]
    pub name: String,
    /// Its MAC address.
    #[serde(rename(deserialize = "hardware-address"))]
    pub mac: Option<String>,
    /// Its addresses.
    #[serde(default, rename(deserialize = "ip-addresses"))]
    pub addresses: Vec<GuestAddress>,
}

/// One address of a guest's interface.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct GuestAddress {
    /// The address as text.
    #[serde(default, rename(deserialize = "ip-address"))]
    pub address: String,
    /// The length of its network prefix.
    #[serde(default)]
    pub prefix: u64,
}

/// The guest's operating system. Source: qga/qapi-schema.json, GuestOSInfo.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct OsInfo {
    /// `debian`, `mswindows` and so on.
    pub id: Option<String>,
    /// The name for people.
    #[serde(rename(deserialize = "pretty-name"))]
    pub pretty_name: Option<String>,
    /// The kernel's release.
    #[serde(rename(deserialize = "kernel-release"))]
    pub kernel_release: Option<String>,
}

impl OsInfo {
    /// Whether freezing goes through Windows' VSS, which lets applications take part and holds for 10 s.
    pub fn is_windows(&self) -> bool {
        self.id.as_deref() == Some("mswindows")
    }
}

/// What a trim of one file system did. Source: qga/qapi-schema.json, GuestFilesystemTrimResult.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct TrimResult {
    /// The mount point.
    #[serde(default)]
    pub path: String,
    /// Bytes trimmed, where it worked.
    pub trimmed: Option<u64>,
    /// Why it did not.
    pub error: Option<String>,
}

impl Agent {
    /// Connects and syncs. A stale half-reply of an earlier client is skipped.
    ///
    /// # Errors
    /// [`Error::Connect`]; [`Error::Timeout`] of `guest-sync-delimited` after `patience`: no agent runs in
    /// the guest, or another client holds the socket; [`Error::Closed`] if it broke the protocol.
    ///
    /// Source: qga/qapi-schema.json, `guest-sync-delimited`.
    pub async fn connect(path: &Path, patience: Duration, limit: Duration) -> Result<Self, Error> {
        let deadline = Instant::now() + patience;
        let connect = Connection::connect(path, Limits::AGENT, Matching::Order);
        let unserved = || Error::Timeout { command: "guest-sync-delimited".to_owned(), after: patience };
        let connection = timeout_at(deadline, connect).await.map_err(|_| unserved())??;
        let agent = Self {
            path: path.to_owned(),
            connection,
            unsettled: AtomicBool::new(true),
            turn: Mutex::new(()),
            info: OnceCell::new(),
            limit,
        };
        let _turn = agent.turn.lock().await;
        agent.settle(patience).await?;
        drop(_turn);
        Ok(agent)
    }

    /// The socket's path, as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the connected socket up, for the thaw guard. Nothing is under way in it then: the guard would
    /// take a late reply to an earlier command for an answer to its freeze.
    ///
    /// # Errors
    /// If the agent does not answer a sync that is due; if no descriptor is left. The socket is closed then.
    pub async fn into_socket(self) -> std::io::Result<StdUnixStream> {
        if self.unsettled.load(Ordering::Relaxed) {
            self.settle(SYNC_LIMIT).await.map_err(std::io::Error::other)?;
        }
        self.connection.into_socket().await
    }

    /// Runs a command by name, with `arguments` an object or null.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the agent lacks the command or has it switched off; [`Error::Timeout`];
    /// [`Error::Refused`]; [`Error::Closed`].
    pub async fn call(&self, command: &str, arguments: Value) -> Result<Box<RawValue>, Error> {
        self.call_within(command, arguments, self.limit).await
    }

    /// As [`Agent::call`], with a limit of its own.
    ///
    /// # Errors
    /// As [`Agent::call`].
    pub async fn call_within(
        &self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Box<RawValue>, Error> {
        let _turn = self.turn.lock().await;
        if self.unsettled.load(Ordering::Relaxed) {
            self.settle(SYNC_LIMIT.min(limit)).await?;
        }
        self.unsettled.store(true, Ordering::Relaxed);
        let arguments = (!arguments.is_null()).then_some(arguments);
        let reply = self.connection.call(command, arguments, Vec::new(), limit).await;
        if !matches!(reply, Err(Error::Timeout { .. })) {
            self.unsettled.store(false, Ordering::Relaxed);
        }
        reply.map_err(|fault| explain(command, fault))
    }

    /// What the agent says of itself, asked once.
    ///
    /// # Errors
    /// As [`Agent::call`]; [`Error::Unexpected`].
    pub async fn info(&self) -> Result<&AgentInfo, Error> {
        let ask = || async {
            #[derive(Deserialize)]
            struct Info {
                #[serde(default)]
                version: String,
                #[serde(default)]
                supported_commands: Vec<CommandInfo>,
            }
            #[derive(Deserialize)]
            struct CommandInfo {
                name: String,
                #[serde(default)]
                enabled: bool,
            }
            let info: Info = self.ask("guest-info", Value::Null).await?;
            let commands = info.supported_commands.into_iter().take(MAX_ITEMS);
            let commands = commands.map(|c| (printable(&c.name, 100), c.enabled)).collect();
            Ok(AgentInfo { version: printable(&info.version, 100), commands })
        };
        self.info.get_or_try_init(ask).await
    }

    /// Makes sure that the agent has `command`, before anything depends on it.
    ///
    /// # Errors
    /// [`Error::Unavailable`] that says whether it is absent or switched off; as [`Agent::info`].
    pub async fn require(&self, command: &str) -> Result<(), Error> {
        let info = self.info().await?;
        let why = match info.commands.get(command) {
            Some(true) => return Ok(()),
            Some(false) => {
                "it is switched off in the guest (see --block-rpcs and --allow-rpcs of qemu-ga, and \
                 its configuration file)"
                    .to_owned()
            }
            None => format!("the guest's agent (version {}) does not know it", info.version),
        };
        Err(Error::Unavailable { command: command.to_owned(), why })
    }

    /// Whether the agent holds a freeze.
    ///
    /// # Errors
    /// As [`Agent::call`]; [`Error::Unexpected`] for a third word.
    pub async fn freeze_status(&self) -> Result<FreezeStatus, Error> {
        let word: String = self.ask("guest-fsfreeze-status", Value::Null).await?;
        match word.as_str() {
            "thawed" => Ok(FreezeStatus::Thawed),
            "frozen" => Ok(FreezeStatus::Frozen),
            _ => Err(unexpected("guest-fsfreeze-status", "neither thawed nor frozen", &word)),
        }
    }

    /// Freezes, for people who asked for just that. A snapshot goes through the thaw guard instead.
    ///
    /// # Errors
    /// As [`Agent::call`].
    pub async fn freeze(&self, mountpoints: &[String]) -> Result<u64, Error> {
        let (command, arguments) = freeze_command(mountpoints);
        self.require(command).await?;
        self.ask(command, arguments).await
    }

    /// Thaws. It is safe at any time; the result is the number of file systems that were frozen.
    ///
    /// # Errors
    /// As [`Agent::call`].
    pub async fn thaw(&self) -> Result<u64, Error> {
        self.ask("guest-fsfreeze-thaw", Value::Null).await
    }

    /// The mounted file systems.
    ///
    /// # Errors
    /// As [`Agent::call`].
    pub async fn filesystems(&self) -> Result<Vec<Filesystem>, Error> {
        self.list("guest-get-fsinfo").await
    }

    /// The network interfaces.
    ///
    /// # Errors
    /// As [`Agent::call`].
    pub async fn interfaces(&self) -> Result<Vec<GuestInterface>, Error> {
        self.list("guest-network-get-interfaces").await
    }

    /// The operating system.
    ///
    /// # Errors
    /// As [`Agent::call`].
    pub async fn os(&self) -> Result<OsInfo, Error> {
        self.ask("guest-get-osinfo", Value::Null).await
    }

    /// The host name.
    ///
    /// # Errors
    /// As [`Agent::call`].
    pub async fn hostname(&self) -> Result<String, Error> {
        #[derive(Deserialize)]
        struct HostName {
            #[serde(rename = "host-name")]
            host_name: String,
        }
        Ok(self.ask::<HostName>("guest-get-host-name", Value::Null).await?.host_name)
    }

    /// The guest's clock in nanoseconds since 1970.
    ///
    /// # Errors
    /// As [`Agent::call`].
    pub async fn time(&self) -> Result<i64, Error> {
        self.ask("guest-get-time", Value::Null).await
    }

    /// Gives unused blocks back to the host.
    ///
    /// # Errors
    /// As [`Agent::call`].
    pub async fn trim(&self, limit: Duration) -> Result<Vec<TrimResult>, Error> {
        #[derive(Deserialize)]
        struct Trim {
            #[serde(default)]
            paths: Vec<TrimResult>,
        }
        let reply = self.call_within("guest-fstrim", Value::Null, limit).await?;
        Ok(decode::<Trim>("guest-fstrim", &reply)?.paths)
    }

    /// Lets the guest write its dirty pages out while nothing waits for it, at most for `limit`.
    ///
    /// Returns false where the agent cannot: it runs no programs, or the guest has no `sync`.
    ///
    /// # Errors
    /// As [`Agent::call`], but for refusals.
    pub async fn sync_disks(&self, limit: Duration) -> Result<bool, Error> {
        #[derive(Deserialize)]
        struct Started {
            pid: i64,
        }
        #[derive(Deserialize)]
        struct Status {
            exited: bool,
        }
        if self.require("guest-exec").await.is_err() || self.require("guest-exec-status").await.is_err() {
            return Ok(false);
        }
        let deadline = Instant::now() + limit;
        let left = || deadline.saturating_duration_since(Instant::now()).min(self.limit);
        let started: Started = match self.call_within("guest-exec", json!({ "path": "sync" }), left()).await {
            Ok(reply) => decode("guest-exec", &reply)?,
            Err(fault) if fault.is_refusal() => return Ok(false),
            Err(fault) => return Err(fault),
        };
        while !left().is_zero() {
            let (command, arguments) = ("guest-exec-status", json!({ "pid": started.pid }));
            let reply = self.call_within(command, arguments, left()).await?;
            if decode::<Status>(command, &reply)?.exited {
                return Ok(true);
            }
            tokio::time::sleep(EXEC_POLL).await;
        }
        Ok(true)
    }

    async fn ask<T: serde::de::DeserializeOwned>(&self, command: &str, arguments: Value) -> Result<T, Error> {
        decode(command, &self.call(command, arguments).await?)
    }

    async fn list<T: serde::de::DeserializeOwned>(&self, command: &str) -> Result<Vec<T>, Error> {
        let mut list: Vec<T> = self.ask(command, Value::Null).await?;
        list.truncate(MAX_ITEMS);
        Ok(list)
    }

    async fn settle(&self, limit: Duration) -> Result<(), Error> {
        self.connection.sync(sync_id(), limit).await?;
        self.unsettled.store(false, Ordering::Relaxed);
        Ok(())
    }
}

/// The command that freezes `mountpoints`, or every file system if there are none.
pub(crate) fn freeze_command(mountpoints: &[String]) -> (&'static str, Value) {
    if mountpoints.is_empty() {
        ("guest-fsfreeze-freeze", Value::Null)
    } else {
        ("guest-fsfreeze-freeze-list", json!({ "mountpoints": mountpoints }))
    }
}

/// A number that no earlier client is likely to have used.
pub(crate) fn sync_id() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    // `RandomState` is the standard library's door to the system's random bits.
    RandomState::new().build_hasher().finish() & MAX_SYNC_ID
}

fn unexpected(command: &str, detail: &str, got: &str) -> Error {
    Error::Unexpected {
        command: command.to_owned(),
        detail: detail.to_owned(),
        excerpt: crate::error::Excerpt::of(got.as_bytes()),
    }
}

/// Tells a command that is not there from one that failed.
fn explain(command: &str, fault: Error) -> Error {
    match fault {
        Error::Refused { refusal, .. } if refusal.class == "CommandNotFound" => {
            Error::Unavailable { command: command.to_owned(), why: refusal.desc }
        }
        other => other,
    }
}
