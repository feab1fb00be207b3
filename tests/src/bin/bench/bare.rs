//! The floor: a client that does nothing but the three round trips, on warm connections.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};

/// How long the three round trips took, in seconds.
#[derive(Debug, Clone, Copy)]
pub struct Trips {
    /// The freeze, to its reply.
    pub freeze: f64,
    /// The transaction, to its reply.
    pub switch: f64,
    /// All three.
    pub window: f64,
}

/// A connected socket with lines.
struct Lines(BufReader<UnixStream>);

impl Lines {
    fn connect(socket: &Path) -> Result<Self> {
        Ok(Self(BufReader::new(UnixStream::connect(socket)?)))
    }

    fn ask(&mut self, request: &[u8]) -> Result<String> {
        self.0.get_mut().write_all(request)?;
        loop {
            let mut line = String::new();
            ensure!(self.0.read_line(&mut line)? > 0, "the connection ended");
            if !line.contains("\"event\"") {
                ensure!(line.contains("\"return\""), "{line}");
                return Ok(line);
            }
        }
    }
}

/// Freezes, runs `transaction` and thaws. Connections and syncs are not counted.
pub fn freeze_switch_thaw(qmp: &Path, agent: &Path, transaction: &str) -> Result<Trips> {
    let mut qmp = Lines::connect(qmp)?;
    let mut greeting = String::new();
    qmp.0.read_line(&mut greeting)?;
    qmp.ask(b"{\"execute\":\"qmp_capabilities\"}\n")?;
    let mut agent = Lines::connect(agent)?;
    // Warm: the agent has been asked something on this connection before.
    agent.ask(b"{\"execute\":\"guest-sync\",\"arguments\":{\"id\":7}}\n")?;
    agent.ask(b"{\"execute\":\"guest-fsfreeze-status\"}\n")?;
    let transaction = format!("{transaction}\n");

    let begun = Instant::now();
    agent.ask(b"{\"execute\":\"guest-fsfreeze-freeze\"}\n")?;
    let frozen = begun.elapsed();
    let switched = qmp.ask(transaction.as_bytes());
    let done = begun.elapsed();
    agent.ask(b"{\"execute\":\"guest-fsfreeze-thaw\"}\n")?;
    let window = begun.elapsed();
    switched?;
    let seconds = |duration: std::time::Duration| duration.as_secs_f64();
    Ok(Trips { freeze: seconds(frozen), switch: seconds(done - frozen), window: seconds(window) })
}
