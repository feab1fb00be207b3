//! Deleting a snapshot, beside `qemu-img commit` and beside the bare job of QEMU's; and what 200 snapshots cost to look at.
//!
//! The VM is a QEMU without a guest: what is measured is the copying and all that goes with it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tests::lab::{Cli, Lab, Qemu, RawQmp};
use tokio::process::{Child, Command};

use crate::stats::{machine, ms, percentile, version};

const GIB: u64 = 1 << 30;
/// What is written to QEMU's human monitor at once.
const PIECE: u64 = 64 << 20;
/// Snapshots of the VM that is looked at.
const DEEP: usize = 200;
/// So many of them follow each other.
const BRANCH: usize = 50;

/// A QEMU with one disk, and the `snapctl` that knows it.
struct Machine {
    qemu: Option<Child>,
    dir: tempfile::TempDir,
    cli: Cli,
    qmp: RawQmp,
}

impl Machine {
    async fn start() -> Result<Self> {
        let cli = Cli::new()?;
        // Beside the images of the lab's guests, not in memory.
        let dir = tempfile::tempdir_in(cli.root())?;
        let base = dir.path().join("base.qcow2");
        command(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&base).arg("4G")).await?;
        let program = Lab::get()?.qemu(Qemu::Distro)?;
        let disk = json!({
            "driver": "qcow2", "node-name": "d0", "discard": "unmap",
            "file": { "driver": "file", "filename": base },
        });
        let socket = |name: &str| format!("unix:{},server=on,wait=off", dir.path().join(name).display());
        let mut qemu = Command::new(&program.path);
        qemu.args(["-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-S"]);
        qemu.arg("-blockdev").arg(disk.to_string());
        qemu.args([
            "-device",
            "virtio-blk-pci,drive=d0,id=vda",
            "-qmp",
            &socket("qmp"),
            "-qmp",
            &socket("own"),
        ]);
        let qemu = qemu.stdin(Stdio::null()).kill_on_drop(true).spawn()?;
        let (qmp, own) = (dir.path().join("qmp"), dir.path().join("own"));
        while !own.exists() || !qmp.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let qmp_path = qmp.display().to_string();
        cli.run(["vm", "add", "vm1", "--qmp", &qmp_path]).await?.ok()?;
        Ok(Self { qemu: Some(qemu), qmp: RawQmp::connect(&own).await?, dir, cli })
    }

    async fn run(&self, line: &str) -> Result<Duration> {
        Ok(self.cli.run(line.split(' ')).await?.ok()?.took)
    }

    /// Fills a GiB of the disk, `at` GiB from its start.
    async fn fill(&mut self, at: u64) -> Result<()> {
        let blocks = self.qmp.call("query-block", json!({})).await?;
        let device = blocks[0]["qdev"].as_str().context("no disk")?.to_owned();
        for piece in 0..GIB / PIECE {
            let start = at * GIB + piece * PIECE;
            let line = format!("qemu-io -d {device} \"write -q -P {} {start} {PIECE}\"", 1 + at);
            let said = self.qmp.call("human-monitor-command", json!({ "command-line": line })).await?;
            ensure!(said == "", "{said}");
        }
        Ok(())
    }

    /// Two snapshots whose layers hold a GiB each, not the same one.
    async fn with_layers() -> Result<Self> {
        let mut machine = Self::start().await?;
        machine.fill(0).await?;
        machine.run("create vm1 --name a -q").await?;
        machine.fill(1).await?;
        machine.run("create vm1 --name b -q").await?;
        // Neither side pays for what the other left to be written back.
        command(&mut Command::new("sync")).await?;
        Ok(machine)
    }

    async fn stop(&mut self) -> Result<()> {
        self.qmp.call("quit", json!({})).await?;
        if let Some(mut qemu) = self.qemu.take() {
            qemu.wait().await?;
        }
        Ok(())
    }

    /// The plan of deleting `a`: how its layer would go.
    async fn merge(&self) -> Result<Value> {
        let plan = self.cli.run(["delete", "vm1", "a", "--dry-run", "--json"]).await?.ok()?.json()?;
        Ok(plan["plan"]["disks"][0]["merges"][0].clone())
    }

    fn file(&self, merge: &Value, key: &str) -> Result<PathBuf> {
        Ok(merge[key].as_str().with_context(|| format!("{key} in {merge}"))?.into())
    }
}

/// Prints how long deleting takes, stopped and running.
pub async fn chain(rounds: usize) -> Result<()> {
    println!("### Deleting a snapshot whose layer holds 1 GiB\n");
    println!("{}; {}; {rounds} rounds of either side, by turns.\n", machine(), version("qemu-system-x86_64"));
    println!("| VM | side | p50 | ratio |");
    println!("| --- | --- | --- | --- |");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        theirs.push(qemu_img().await?);
        ours.push(deleted(false).await?);
    }
    print("stopped", "qemu-img commit", &ours, &theirs);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        theirs.push(bare_job().await?);
        ours.push(deleted(true).await?);
    }
    print("running", "the bare QMP job", &ours, &theirs);
    println!(
        "\nTimes in ms, until the data is on the device and the file that went away is removed. Goal: at most 1.05 × of either."
    );
    Ok(())
}

fn print(vm: &str, peer: &str, ours: &[f64], theirs: &[f64]) {
    let (ours, theirs) = (percentile(ours, 0.5), percentile(theirs, 0.5));
    println!("| {vm} | snapctl delete | {} | {:.2} × |", ms(ours), ours / theirs);
    println!("| {vm} | {peer} | {} | |", ms(theirs));
}

async fn deleted(running: bool) -> Result<f64> {
    let mut machine = Machine::with_layers().await?;
    if !running {
        machine.stop().await?;
    }
    Ok(machine.run("delete vm1 a -q").await?.as_secs_f64())
}

async fn qemu_img() -> Result<f64> {
    let mut machine = Machine::with_layers().await?;
    machine.stop().await?;
    let merge = machine.merge().await?;
    let [lower, upper] = layers(&machine, &merge)?;
    unseal(&[&lower, &upper]).await?;
    let begun = Instant::now();
    command(Command::new("qemu-img").args(["commit", "-q", "-d", "-f", "qcow2"]).arg(&upper)).await?;
    // snapctl's result is on the device, and the file that is not needed any more is gone; so they are here then.
    command(Command::new("sync").arg(&lower)).await?;
    std::fs::remove_file(&upper)?;
    Ok(begun.elapsed().as_secs_f64())
}

/// The two layers that are merged, lower one first.
fn layers(machine: &Machine, merge: &Value) -> Result<[PathBuf; 2]> {
    match merge["merge"].as_str() {
        Some("commit") => Ok([machine.file(merge, "base")?, machine.file(merge, "top")?]),
        Some("stream") => {
            Ok([merge["gone"][0].as_str().context("gone")?.into(), machine.file(merge, "into")?])
        }
        other => bail!("{other:?} is no merge of layers"),
    }
}

/// The job that snapctl would start, by a client that does nothing else.
async fn bare_job() -> Result<f64> {
    let mut machine = Machine::with_layers().await?;
    let merge = machine.merge().await?;
    let [lower, upper] = layers(&machine, &merge)?;
    unseal(&[&lower, &upper]).await?;
    let nodes = machine.qmp.call("query-named-block-nodes", json!({ "flat": true })).await?;
    let blocks = machine.qmp.call("query-block", json!({})).await?;
    let top = blocks[0]["inserted"]["node-name"].clone();
    // The base is the node that was given on the command line; the layer above is the one that is not the active one.
    let is_upper =
        |node: &&Value| node["drv"] == "qcow2" && node["node-name"] != "d0" && node["node-name"] != top;
    let upper_node = nodes.as_array().into_iter().flatten().find(is_upper).context("no node between")?;
    let upper_node = upper_node["node-name"].clone();
    let begun = Instant::now();
    if merge["merge"] == "commit" {
        let job = json!({
            "job-id": "j", "device": top, "top-node": upper_node, "base-node": "d0", "backing-file": lower,
        });
        machine.qmp.call("block-commit", job).await?;
    } else {
        machine.qmp.call("block-stream", json!({ "job-id": "j", "device": upper_node })).await?;
    }
    let ended = machine.qmp.event("BLOCK_JOB_COMPLETED", Duration::from_secs(300)).await?;
    ensure!(ended["data"].get("error").is_none(), "{ended}");
    let is_commit = merge["merge"] == "commit";
    let (survivor, gone) = if is_commit { (&lower, &upper) } else { (&upper, &lower) };
    command(Command::new("sync").arg(survivor)).await?;
    // As long as QEMU has the file open, removing it costs nothing yet.
    let gone_node =
        if is_commit { upper_node.as_str().context("no name")?.to_owned() } else { "d0".to_owned() };
    for node in [gone_node.clone(), format!("{gone_node}f")] {
        // One that QEMU opened by itself goes with the one above.
        let _ = machine.qmp.call("blockdev-del", json!({ "node-name": node })).await;
    }
    std::fs::remove_file(gone)?;
    Ok(begun.elapsed().as_secs_f64())
}

async fn unseal(paths: &[&Path]) -> Result<()> {
    command(Command::new("chattr").arg("-i").args(paths)).await?;
    command(Command::new("chmod").arg("u+w").args(paths)).await
}

async fn command(command: &mut Command) -> Result<()> {
    let output = command.output().await?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Prints how long it takes to look at many snapshots.
pub async fn depth(rounds: usize) -> Result<()> {
    println!("### Looking at {DEEP} snapshots\n");
    println!("{}; {}; {rounds} rounds.\n", machine(), version("qemu-system-x86_64"));
    println!("| command | VM | p50 | p99 |");
    println!("| --- | --- | --- | --- |");
    let mut machine = Machine::start().await?;
    let mut created = Vec::new();
    for n in 0..DEEP {
        // A chain has its limit, and a tree has branches.
        if n % BRANCH == BRANCH - 1 {
            machine.run("revert vm1 s0 --discard -q").await?;
        }
        created.push(machine.run(&format!("create vm1 --name s{n} -q")).await?.as_secs_f64());
    }
    for running in [true, false] {
        if !running {
            machine.stop().await?;
        }
        for line in ["list vm1", "tree vm1"] {
            let mut walls = Vec::new();
            for _ in 0..rounds {
                walls.push(machine.run(line).await?.as_secs_f64());
            }
            let (vm, p50, p99) = (
                if running { "running" } else { "stopped" },
                percentile(&walls, 0.5),
                percentile(&walls, 0.99),
            );
            println!("| snapctl {line} | {vm} | {} | {} |", ms(p50), ms(p99));
        }
    }
    let last = created.last_chunk::<10>().context("too few")?;
    println!(
        "\nTimes in ms. Goal: under 50. The last ten of the {DEEP} `create`s took {} each (p50).",
        ms(percentile(last, 0.5))
    );
    ensure!(machine.dir.path().exists(), "its directory is gone");
    Ok(())
}
