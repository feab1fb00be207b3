//! What the end-to-end tests share: a writing guest with its registered VM, and the oracle over both.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tests::lab::{
    Cli, DiskSpec, Format, Guest, GuestSpec, Layer, Progress, RawQmp, Run, check_same_instant, read_records,
};
use tokio::process::Child;

/// Longer than anything that is awaited here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at what gives no event.
const POLL: Duration = Duration::from_millis(3);
/// Records that a guest writes to prove that it goes on.
const SIGN_OF_LIFE: u64 = 3;

/// SIGKILL, as a shell shows it.
pub const KILLED: i32 = 137;

/// A guest and the `snapctl` that knows it as `vm1`.
pub struct Scene {
    pub guest: Guest,
    pub cli: Cli,
    /// The test's own monitor.
    pub qmp: RawQmp,
}

/// The VM's two disks in most tests: one of the new kind, one of the old.
pub fn two_disks() -> [DiskSpec; 2] {
    [DiskSpec::new("va"), DiskSpec::new("sb").raw().scsi().drive()]
}

impl Scene {
    /// Boots, registers, and waits until the guest writes.
    pub async fn boot(spec: GuestSpec) -> Result<Self> {
        let guest = spec.writer(50).boot().await?;
        let cli = Cli::with_vm("vm1", &guest).await?;
        let qmp = guest.lab_qmp().await?;
        guest.wait_records(SIGN_OF_LIFE).await?;
        Ok(Self { guest, cli, qmp })
    }

    /// Runs `snapctl` with words separated by blanks.
    pub async fn run(&self, line: &str) -> Result<Run> {
        self.cli.run(line.split_whitespace()).await
    }

    /// As [`Scene::run`], with a fault point armed.
    pub async fn run_faulty(&self, line: &str, fault: &str) -> Result<Run> {
        self.cli.run_with(line.split_whitespace(), &[("SNAPCTL_FAULT", fault)]).await
    }

    /// Starts `snapctl`, and waits until it has stopped at `point`.
    pub async fn stop_at(&self, line: &str, point: &str) -> Result<Stopped> {
        let fault = format!("{point}=stop");
        let child = self.cli.spawn(line.split_whitespace(), &[("SNAPCTL_FAULT", &fault)])?;
        let stopped = Stopped { pid: child.id().context("it has ended")?, child };
        let state = || process_state(stopped.pid);
        wait_until(&format!("{line} stops at {point}"), || !matches!(state(), Some('R' | 'S' | 'D'))).await?;
        ensure!(state() == Some('T'), "{line} did not stop at {point}");
        Ok(stopped)
    }

    /// The names of the snapshots that `snapctl list` shows, oldest first.
    pub async fn snapshots(&self) -> Result<Vec<Value>> {
        let list = self.run("list vm1 --json").await?;
        Ok(list.ok()?.json()?["snapshots"].as_array().context("snapshots")?.clone())
    }

    /// Their names.
    pub async fn names(&self) -> Result<Vec<String>> {
        let snapshots = self.snapshots().await?;
        let name = |snapshot: &Value| snapshot["name"].as_str().map(str::to_owned);
        snapshots.iter().map(name).collect::<Option<_>>().context("a snapshot without a name")
    }

    /// The snapshot `name`, if there is one.
    pub async fn snapshot(&self, name: &str) -> Result<Option<Value>> {
        Ok(self.snapshots().await?.into_iter().find(|snapshot| snapshot["name"] == name))
    }

    /// Holds if the VM is as sound as if nothing had ever gone wrong: see each line.
    pub async fn assert_sound(&mut self) -> Result<()> {
        self.assert_settled().await?;
        self.assert_thawed().await?;
        self.assert_nothing_leaked().await?;
        self.run("check vm1 --deep").await?.ok()?;
        for layer in self.layers().await? {
            ensure!(layer.sealed != layer.active, "{}: sealed {}", layer.path.display(), layer.sealed);
        }
        Ok(())
    }

    /// The guest writes on, and the agent holds no freeze.
    pub async fn assert_thawed(&mut self) -> Result<()> {
        self.guest.wait_records(SIGN_OF_LIFE).await.context("the guest does not write on")?;
        let status = self.qmp.call("query-status", json!({})).await?;
        ensure!(status["status"] == "running", "{status}");
        let said = self.run("guest status vm1 --wait 20").await?;
        ensure!(said.ok()?.stdout == "vm1: thawed\n", "{said:?}");
        Ok(())
    }

    /// Nothing waits in the journal, and recovering changes nothing.
    pub async fn assert_settled(&self) -> Result<()> {
        let again = self.run("recover vm1").await?;
        ensure!(again.ok()?.stdout == "nothing was interrupted\n", "{again:?}");
        Ok(())
    }

    /// No file, node, job, lock or process is left of what ended.
    pub async fn assert_nothing_leaked(&mut self) -> Result<()> {
        wait_until("the thaw guard ends", || self.guards().is_empty()).await?;
        let jobs = self.qmp.call("query-jobs", json!({})).await?;
        ensure!(jobs == json!([]), "jobs: {jobs}");
        let unused = self.unused_nodes().await?;
        ensure!(unused.is_empty(), "nodes that no disk uses: {unused:?}");
        let mut known: BTreeSet<PathBuf> = self.layers().await?.into_iter().map(|layer| layer.path).collect();
        for snapshot in self.snapshots().await? {
            known.extend(memory_of(&snapshot));
            known.extend(copies_of(&snapshot));
        }
        let stray: Vec<PathBuf> = self.images()?.into_iter().filter(|path| !known.contains(path)).collect();
        ensure!(stray.is_empty(), "files that belong to nothing: {stray:?}");
        let removed = self.removed_and_open()?;
        ensure!(removed.is_empty(), "removed files that QEMU has open: {removed:?}");
        let lock = fs::File::options().read(true).write(true).open(self.lock_file())?;
        ensure!(lock.try_lock().is_ok(), "the VM's lock is held");
        Ok(())
    }

    /// Removed files of the guest's that its QEMU has open: their room is not free.
    fn removed_and_open(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.guest.pid()))?;
        let open = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        let disks = self.guest.dir().join("disks");
        let is_ours =
            |path: &PathBuf| path.starts_with(&disks) && path.to_string_lossy().ends_with(" (deleted)");
        Ok(open.filter(is_ours).collect())
    }

    /// Nodes that snapctl named and that hang on no disk.
    pub async fn unused_nodes(&mut self) -> Result<Vec<String>> {
        Ok(unused_nodes(&self.qmp.call("x-debug-query-block-graph", json!({})).await?))
    }

    /// The snapshot is whole: its layers hold all that was synced before, and are of one instant.
    pub fn assert_whole(&self, snapshot: &Value, before: &Progress) -> Result<()> {
        let mut disks = Vec::new();
        for disk in self.guest.mounted() {
            let layers = snapshot["disks"].as_array().context("disks")?;
            let layer =
                layers.iter().find(|layer| layer["disk"] == disk.id()).context("a disk is missing")?;
            let text = |key: &str| layer[key].as_str().context("layer");
            let copy = Layer::copy(Path::new(text("path")?), text("format")?)?;
            let state = copy.fs_state()?;
            if snapshot["consistency"] == "filesystem" {
                ensure!(!state.needs_recovery && state.fsck_clean, "{}: {state:?}", disk.id());
            }
            let records = copy.records()?;
            let synced = before[disk.id()];
            ensure!(records.len() as u64 >= synced, "{}: {} of {synced}", disk.id(), records.len());
            disks.push(records);
        }
        check_same_instant(&disks)
    }

    /// All layers of all disks, those of branches last, as `snapctl tree` shows them.
    pub async fn layers(&self) -> Result<Vec<Shown>> {
        let tree = self.run("tree vm1 --json").await?.ok()?.json()?;
        let disks = tree["disks"].as_array().context("disks")?;
        let branches = disks.iter().flat_map(|disk| disk["branches"].as_array().into_iter().flatten());
        let layers =
            disks.iter().chain(branches).flat_map(|on| on["layers"].as_array().into_iter().flatten());
        let shown = layers.map(|layer| Shown {
            path: layer["path"].as_str().unwrap_or_default().into(),
            active: layer["active"] == true,
            sealed: layer["sealed"] == true,
        });
        Ok(shown.collect())
    }

    /// The active layer of each of the guest's disks, as `snapctl disk path` prints it.
    pub async fn active_layers(&self) -> Result<BTreeMap<String, PathBuf>> {
        let mut active = BTreeMap::new();
        for disk in self.guest.disks() {
            let path = self.run(&format!("disk path vm1 {}", disk.id())).await?;
            active.insert(disk.id().to_owned(), PathBuf::from(path.ok()?.stdout.trim()));
        }
        Ok(active)
    }

    /// Ends the guest as a power cut would, and looks for all that it had synced in the active layers.
    pub async fn assert_nothing_lost(mut self) -> Result<()> {
        let synced = self.guest.progress()?;
        self.guest.kill().await?;
        self.assert_active_layers_hold(&synced).await
    }

    /// The active layers hold at least the records in `synced`, in order. Nothing has them open.
    pub async fn assert_active_layers_hold(&self, synced: &Progress) -> Result<()> {
        for (disk, path) in self.active_layers().await? {
            let format = if path.extension().is_some_and(|end| end == "raw") { "raw" } else { "qcow2" };
            let records = read_records(&path, format)?.len() as u64;
            ensure!(records >= synced[&disk], "{disk}: {records} of {synced:?}");
        }
        Ok(())
    }

    /// Starts a VM that has ended again, from its active layers, which are all qcow2.
    pub async fn start_again(self) -> Result<Self> {
        let active = self.active_layers().await?;
        let Self { guest, cli, .. } = self;
        let guest = guest.boot_again(|disk| (active[disk.id()].clone(), Format::Qcow2)).await?;
        Ok(Self { qmp: guest.lab_qmp().await?, guest, cli })
    }

    /// Waits until a guest that may have been reset writes again.
    pub async fn back_up(&self) -> Result<()> {
        self.guest.wait_agent().await?;
        self.guest.start_writer(50).await?;
        // What was told before the reset does not count any more.
        self.guest.control("wait 1").await.map(drop)
    }

    /// What is only in the guest's memory: which boot it is, and what [`Scene::set_mark`] wrote.
    pub async fn mark(&self) -> Result<String> {
        let (code, text) = self.guest.shell("cat /proc/sys/kernel/random/boot_id /tmp/mark").await?;
        ensure!(code == 0, "{text}");
        Ok(text)
    }

    /// Writes something that is only in the guest's memory.
    pub async fn set_mark(&self, mark: &str) -> Result<()> {
        let (code, text) = self.guest.shell(&format!("echo {mark} > /tmp/mark")).await?;
        ensure!(code == 0, "{text}");
        Ok(())
    }

    /// The image files that lie beside the guest's disks.
    pub fn images(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(self.guest.dir().join("disks"))?;
        Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_file()).collect())
    }

    /// The thaw guards that this scene's `snapctl` started.
    pub fn guards(&self) -> Vec<u32> {
        let home = format!("HOME={}", self.cli.root().display()).into_bytes();
        let is_ours = |pid: &u32| {
            let read = |what: &str| fs::read(format!("/proc/{pid}/{what}")).unwrap_or_default();
            read("cmdline").split(|byte| *byte == 0).any(|word| word == b"--thaw-guard")
                && read("environ").split(|byte| *byte == 0).any(|variable| variable == home)
        };
        pids().filter(is_ours).collect()
    }

    fn lock_file(&self) -> PathBuf {
        self.cli.root().join("run/snapctl/locks/vm-vm1.lock")
    }
}

/// The file that holds the snapshot's memory.
pub fn memory_of(snapshot: &Value) -> Option<PathBuf> {
    Some(snapshot["memory"]["path"].as_str()?.into())
}

/// The copies of firmware variables and TPM state.
pub fn copies_of(snapshot: &Value) -> Vec<PathBuf> {
    let files = snapshot["platform"].as_array().cloned().unwrap_or_default();
    files.iter().filter_map(|file| Some(file["copy"].as_str()?.into())).collect()
}

/// One layer as `snapctl tree` shows it.
pub struct Shown {
    pub path: PathBuf,
    pub active: bool,
    pub sealed: bool,
}

/// A small file system that is gone with its test.
pub struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// Mounts one; none, and that is said, where this user may not.
    pub fn mount(options: &str) -> Result<Option<Self>> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: only root may mount a small file system");
            return Ok(None);
        }
        let dir = tempfile::tempdir()?;
        let mut mount = std::process::Command::new("mount");
        let status = mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(dir.path()).status()?;
        ensure!(status.success(), "mount: {status}");
        Ok(Some(Self(dir)))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily, since a QEMU that has just been killed may still hold a file.
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// A `snapctl` that stands still at a fault point.
pub struct Stopped {
    pub pid: u32,
    child: Child,
}

/// How a `snapctl` that was stopped ended.
#[derive(Debug)]
#[must_use = "it may have failed"]
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Stopped {
    /// Sends it a signal; it arrives when it goes on.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        send(self.pid, signal)
    }

    /// Lets it go on, and waits until it has ended.
    pub async fn go_on(self) -> Result<Ended> {
        self.signal(Signal::CONT)?;
        self.end().await
    }

    /// Ends it as the OOM killer would.
    pub async fn kill(self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.end().await.map(drop)
    }

    /// Waits until it has ended.
    pub async fn end(self) -> Result<Ended> {
        use std::os::unix::process::ExitStatusExt;

        let output = tokio::time::timeout(PATIENCE, self.child.wait_with_output()).await;
        let output = output.context("it does not end")??;
        let code = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Ended { code, stdout: text(output.stdout), stderr: text(output.stderr) })
    }
}

impl Ended {
    /// Itself, if it ended with `code`.
    pub fn expect_code(&self, code: i32) -> Result<&Self> {
        ensure!(self.code == code, "exit code {} where {code} was expected: {self:#?}", self.code);
        Ok(self)
    }
}

/// Sends a process a signal.
pub fn send(pid: u32, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("no process")?;
    Ok(kill_process(pid, signal)?)
}

/// Waits until `done`, for what gives no event.
pub async fn wait_until(what: &str, mut done: impl FnMut() -> bool) -> Result<()> {
    let since = Instant::now();
    while !done() {
        if since.elapsed() > PATIENCE {
            bail!("not within {PATIENCE:?}: {what}");
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Says that `text` holds each of `words`: what a message has to tell.
pub fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "nothing about {word:?} in:\n{text}");
    }
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// The letter in `/proc/PID/stat`, or none if there is no such process.
fn process_state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn unused_nodes(graph: &Value) -> Vec<String> {
    let list = |key: &str| graph[key].as_array().cloned().unwrap_or_default();
    let (nodes, edges) = (list("nodes"), list("edges"));
    let disks = nodes.iter().filter(|node| node["type"] == "block-backend");
    let mut reached: Vec<Value> = disks.map(|node| node["id"].clone()).collect();
    let mut at = 0;
    while let Some(parent) = reached.get(at).cloned() {
        let below = edges.iter().filter(|edge| edge["parent"] == parent).map(|edge| edge["child"].clone());
        let new: Vec<Value> = below.filter(|id| !reached.contains(id)).collect();
        reached.extend(new);
        at += 1;
    }
    let unreached = nodes.iter().filter(|node| !reached.contains(&node["id"]));
    unreached
        .filter_map(|node| node["name"].as_str())
        .filter(|name| is_ours(name))
        .map(str::to_owned)
        .collect()
}

/// Whether a node's name is one that snapctl gives: `s????????-N`, `f` behind it for the protocol node.
fn is_ours(name: &str) -> bool {
    let tag = name.strip_prefix('s').and_then(|rest| rest.split_once('-'));
    tag.is_some_and(|(tag, _)| tag.len() == 8 && tag.bytes().all(|byte| byte.is_ascii_hexdigit()))
}
