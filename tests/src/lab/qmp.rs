//! A bare QMP client: the tests' own eyes, which share nothing with the client under test.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// What QEMU answers at once it answers within this, on a machine that is busy with other tests too.
const PATIENCE: Duration = Duration::from_secs(30);

/// One connection to a QMP socket, ready for commands.
#[derive(Debug)]
pub struct RawQmp {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    events: VecDeque<Value>,
}

impl RawQmp {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// When nobody listens, or the greeting does not come (somebody else holds the socket).
    pub async fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).await.with_context(|| socket.display().to_string())?;
        let (reader, writer) = stream.into_split();
        let mut qmp = Self { reader: BufReader::new(reader), writer, events: VecDeque::new() };
        let greeting = qmp.line(PATIENCE).await?;
        if greeting.get("QMP").is_none() {
            bail!("{} does not greet as QMP: {greeting}", socket.display());
        }
        qmp.call("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs a command and returns its `return`.
    ///
    /// # Errors
    /// QEMU's error, with the command.
    pub async fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if arguments.as_object().is_some_and(|map| !map.is_empty()) {
            request["arguments"] = arguments;
        }
        self.writer.write_all(format!("{request}\n").as_bytes()).await?;
        loop {
            let mut reply = self.line(PATIENCE).await?;
            if reply.get("event").is_some() {
                self.events.push_back(reply);
            } else if let Some(error) = reply.get("error") {
                bail!("{command}: {error}");
            } else {
                return Ok(reply["return"].take());
            }
        }
    }

    /// Returns the next event of this name; earlier events of other names are dropped.
    ///
    /// # Errors
    /// When it does not come within `patience`.
    pub async fn event(&mut self, name: &str, patience: Duration) -> Result<Value> {
        let wanted = |event: &Value| event["event"] == name;
        while let Some(event) = self.events.pop_front() {
            if wanted(&event) {
                return Ok(event);
            }
        }
        let until = tokio::time::Instant::now() + patience;
        loop {
            let rest = until.saturating_duration_since(tokio::time::Instant::now());
            let event = self.line(rest).await.with_context(|| format!("waiting for {name}"))?;
            if wanted(&event) {
                return Ok(event);
            }
        }
    }

    async fn line(&mut self, patience: Duration) -> Result<Value> {
        let mut line = String::new();
        let read = tokio::time::timeout(patience, self.reader.read_line(&mut line)).await;
        if read.with_context(|| format!("QMP is silent for {patience:?}"))?? == 0 {
            bail!("QEMU closed the QMP connection");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
