//! QEMU's own block layer without a VM, for layers that no VM has open: the jobs are the same as on a running one,
//! so there is one way to merge.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use agent_client::{BlockdevAdd, GREETING_LIMIT, Qmp, QueryBlockGraph, QueryNamedBlockNodes};
use host::tied::Tie;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use crate::error::StepError;
use crate::target::Target;

const PROGRAM: &str = "qemu-storage-daemon";
/// How long it may take to start, and to end: it writes its caches back then.
const LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);
/// Most of what it says that is taken up in an error.
const MAX_SAID: usize = 2000;

/// A daemon with nothing open yet. Dropped, it is killed.
pub(crate) struct Daemon {
    child: Child,
    socket: PathBuf,
    pub qmp: Qmp,
}

impl Daemon {
    /// Starts it for `target`, with its monitor in a private directory; `name` tells it from others.
    pub async fn start(tie: &Tie, target: &Target<'_>, name: &str) -> Result<Self, StepError> {
        let run = &target.paths().run;
        host::files::make_private_dir(run)?;
        let socket = run.join(format!("{name}.sock"));
        // What a killed one left.
        host::files::remove_durably(&socket)?;
        let mut command = Command::from(host::tied::command(&tie.program, &tie.argument));
        let path = socket.display().to_string().replace(',', ",,");
        command.args([PROGRAM, "--chardev"]).arg(format!("socket,id=qmp,path={path},server=on,wait=off"));
        command.args(["--monitor", "chardev=qmp"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().map_err(|fault| StepError::Daemon(fault.to_string()))?;
        let qmp = connect(&mut child, &socket, target.timeout()).await?;
        Ok(Self { child, socket, qmp })
    }

    /// Opens the chain that ends in the qcow2 image `top`, which is written to where a job wants that.
    pub async fn open(&self, top: &Path) -> Result<(), StepError> {
        let image = json!({
            "driver": "qcow2",
            "node-name": "top",
            "discard": "unmap",
            "file": { "driver": "file", "filename": top, "discard": "unmap" },
        });
        self.qmp.execute(&BlockdevAdd(image)).await?;
        Ok(())
    }

    /// The nodes through which it has the file open, the format node first.
    pub async fn nodes_on(&self, path: &Path) -> Result<Vec<String>, StepError> {
        let nodes = self.qmp.execute(&QueryNamedBlockNodes { flat: true }).await?;
        let graph = self.qmp.execute(&QueryBlockGraph {}).await?;
        Ok(vm::disks::nodes_on(&nodes, &graph, None, path))
    }

    /// Lets it close everything, and waits until it has.
    pub async fn quit(mut self) -> Result<(), StepError> {
        let asked = self.qmp.execute_raw("quit", serde_json::Value::Null).await.map(drop);
        let ended = timeout(LIMIT, self.child.wait()).await;
        let _ = host::files::remove_durably(&self.socket);
        match (asked, ended) {
            (_, Ok(Ok(status))) if status.success() => Ok(()),
            (_, Ok(Ok(status))) => Err(StepError::Daemon(format!("it ended with {status}"))),
            (Err(fault), _) => Err(fault.into()),
            (Ok(()), _) => Err(StepError::Daemon(format!("it did not end within {LIMIT:?}"))),
        }
    }
}

async fn connect(child: &mut Child, socket: &Path, limit: Duration) -> Result<Qmp, StepError> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match Qmp::connect(socket, GREETING_LIMIT, limit).await {
            Ok(qmp) => return Ok(qmp),
            Err(fault) if Instant::now() >= deadline => return Err(fault.into()),
            Err(_) => {}
        }
        if child.try_wait().is_ok_and(|ended| ended.is_some()) {
            return Err(StepError::Daemon(said(child).await));
        }
        sleep(POLL).await;
    }
}

async fn said(child: &mut Child) -> String {
    let mut text = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        // What cannot be read is not said.
        let _ = stderr.take(MAX_SAID as u64).read_to_end(&mut text).await;
    }
    let text = String::from_utf8_lossy(&text);
    agent_client::printable(text.trim(), MAX_SAID)
}
