//! Pools: a clone by reflink, the map of a large image, a copy between pools, and how long a guest stands still.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::lab::{Cli, DiskSpec, Guest, Lab, Qemu, can_mount_xfs};

use crate::stats::{machine, machine_with_guests, ms, percentile, version};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// Runs `rounds` rounds of each, either side by turns.
pub async fn run(rounds: usize) -> Result<()> {
    ensure!(can_mount_xfs(), "only root can mount an XFS, and the kernel has to have it");
    let xfs = Xfs::mount(24)?;
    let cli = Cli::new()?;
    let here = tempfile::tempdir_in(Lab::get()?.cache())?;
    for (name, path) in [("x1", xfs.dir().join("pool")), ("d1", here.path().join("pool"))] {
        cli.run(["pool", "define", name, "dir", "--path", &path.display().to_string()]).await?.ok()?;
    }
    println!(
        "### Volumes\n\n{}; {}; {rounds} rounds of either side, by turns.\n",
        machine(),
        version("qemu-img")
    );
    println!("| what | side | p50 | ratio |\n| --- | --- | --- | --- |");
    clone(&cli, &xfs.dir().join("pool"), rounds).await?;
    map(&cli, here.path(), rounds).await?;
    copy(&cli, here.path(), &xfs.dir().join("pool"), rounds).await?;
    println!("\nTimes in ms.");
    stands_still(rounds).await
}

/// An XFS in a file, unmounted at its end.
struct Xfs(tempfile::TempDir);

impl Xfs {
    fn mount(gib: u64) -> Result<Self> {
        let dir = tempfile::tempdir_in(Lab::get()?.cache())?;
        let image = dir.path().join("image");
        File::create(&image)?.set_len(gib * GIB)?;
        fs::create_dir(dir.path().join("mnt"))?;
        done(Command::new("mkfs.xfs").arg("-q").arg(&image))?;
        done(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(dir.path().join("mnt")))?;
        Ok(Self(dir))
    }

    fn dir(&self) -> PathBuf {
        self.0.path().join("mnt")
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.dir()).status();
    }
}

fn done(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn row(what: &str, side: &str, times: &[f64], peer: Option<&[f64]>) {
    let p50 = percentile(times, 0.5);
    let ratio = peer.map_or_else(String::new, |peer| format!("{:.2} ×", p50 / percentile(peer, 0.5)));
    println!("| {what} | {side} | {} | {ratio} |", ms(p50));
}

fn timed(command: &mut Command) -> Result<f64> {
    let since = Instant::now();
    done(command)?;
    Ok(since.elapsed().as_secs_f64())
}

/// So many GiB of data that repeats nowhere, in stretches over the whole file.
fn fill(path: &Path, size: u64, data: u64, stretch: u64) -> Result<()> {
    let file = File::options().write(true).open(path)?;
    let count = data / stretch;
    let mut block = vec![0_u8; usize::try_from(MIB)?];
    for nth in 0..count {
        let at = nth * (size / count) / MIB * MIB;
        for piece in 0..stretch / MIB {
            let seed = nth * stretch / MIB + piece + 1;
            for (word, index) in block.chunks_exact_mut(8).zip(0_u64..) {
                word.copy_from_slice(
                    &((seed * 0x9e37_79b9_7f4a_7c15) ^ index.wrapping_mul(0xd134_2543_de82_ef95))
                        .to_le_bytes(),
                );
            }
            file.write_all_at(&block, at + piece * MIB)?;
        }
    }
    Ok(file.sync_all()?)
}

async fn clone(cli: &Cli, pool: &Path, rounds: usize) -> Result<()> {
    cli.run(["volume", "create", "x1", "v", "20G", "--format", "raw"]).await?.ok()?;
    fill(&pool.join("v.raw"), 20 * GIB, 2 * GIB, 16 * MIB)?;
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    let copy = pool.join("peer.raw");
    for _ in 0..rounds {
        let run = cli.run(["volume", "clone", "x1", "v", "c", "--method", "reflink"]).await?;
        ours.push(run.ok()?.took.as_secs_f64());
        cli.run(["volume", "delete", "x1", "c"]).await?.ok()?;
        peer.push(timed(Command::new("cp").arg("--reflink=always").arg(pool.join("v.raw")).arg(&copy))?);
        File::open(&copy)?.sync_all()?;
        fs::remove_file(&copy)?;
    }
    row("clone of 20 GiB with 2 GiB of data by reflink", "snapctl volume clone", &ours, Some(&peer));
    row("", "cp --reflink=always, which syncs nothing", &peer, None);
    Ok(())
}

/// Writes of 64 KiB all over the disk, and in stretches.
async fn map(cli: &Cli, dir: &Path, rounds: usize) -> Result<()> {
    for (name, stretch) in [("scattered", 64 << 10), ("stretches", 8 * MIB)] {
        let path = dir.join("pool").join(format!("{name}.qcow2"));
        done(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1T"))?;
        let count = 8 * GIB / stretch;
        let mut io = Command::new("qemu-io")
            .args(["-f", "qcow2", "-t", "unsafe"])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        let mut commands = io.stdin.take().context("stdin")?;
        for nth in 0..count {
            writeln!(commands, "write -q -P 7 {} {stretch}", nth * (1024 * GIB / count))?;
        }
        writeln!(commands, "quit")?;
        drop(commands);
        ensure!(io.wait()?.success(), "qemu-io");
        let (mut ours, mut peer) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let run = cli.run(["volume", "show", "d1", name, "--map", "--json"]).await?;
            ours.push(run.ok()?.took.as_secs_f64());
            peer.push(timed(
                Command::new("qemu-img").args(["map", "-f", "qcow2", "--output=json"]).arg(&path),
            )?);
        }
        let root = cli.root().display().to_string();
        let memory = peak(
            &tests::lab::snapctl()?,
            &["--root", &root, "volume", "show", "d1", name, "--map", "--json"],
        )?;
        let what = format!("map of 1 TiB with 8 GiB allocated, {name} ({memory})");
        row(&what, "snapctl volume show --map", &ours, Some(&peer));
        row("", "qemu-img map", &peer, None);
        fs::remove_file(&path)?;
    }
    Ok(())
}

/// The most memory that a program takes, as time(1) would tell it.
fn peak(program: &Path, arguments: &[&str]) -> Result<String> {
    let mut child = Command::new(program).args(arguments).stdout(Stdio::piped()).spawn()?;
    let mut stdout = child.stdout.take().context("stdout")?;
    let status = PathBuf::from(format!("/proc/{}/status", child.id()));
    let mut most = 0;
    let mut piece = vec![0; 1 << 20];
    // It waits for a reader, so that there is always a look before its end.
    while std::io::Read::read(&mut stdout, &mut piece)? > 0 {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib: u64 = line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0);
        most = most.max(kib);
    }
    child.wait()?;
    Ok(format!("{:.1} MiB at most", most as f64 / 1024.0))
}

async fn copy(cli: &Cli, dir: &Path, to: &Path, rounds: usize) -> Result<()> {
    for (format, what) in [("raw", "raw"), ("qcow2", "qcow2")] {
        let from = dir.join("pool").join(format!("c.{format}"));
        cli.run(["volume", "create", "d1", "c", "20G", "--format", "raw"]).await?.ok()?;
        fill(&dir.join("pool/c.raw"), 20 * GIB, 2 * GIB, 16 * MIB)?;
        if format == "qcow2" {
            let raw = dir.join("pool/c.raw");
            done(
                Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(&from),
            )?;
            fs::remove_file(raw)?;
        }
        let (mut ours, mut peer) = (Vec::new(), Vec::new());
        let copy = to.join(format!("peer.{format}"));
        for _ in 0..rounds {
            let run = cli.run(["volume", "copy", "d1", "c", "x1", "n"]).await?;
            ours.push(run.ok()?.took.as_secs_f64());
            cli.run(["volume", "delete", "x1", "n"]).await?.ok()?;
            let since = Instant::now();
            done(
                Command::new("qemu-img")
                    .args(["convert", "-W", "-f", format, "-O", format])
                    .arg(&from)
                    .arg(&copy),
            )?;
            // Both sides end with the data on the device.
            File::open(&copy)?.sync_all()?;
            peer.push(since.elapsed().as_secs_f64());
            fs::remove_file(&copy)?;
        }
        row(
            &format!("copy of 2 GiB ({what}) into a pool on another file system"),
            "snapctl volume copy",
            &ours,
            Some(&peer),
        );
        row("", "qemu-img convert -W, and a sync", &peer, None);
        cli.run(["volume", "delete", "d1", "c"]).await?.ok()?;
    }
    Ok(())
}

/// For how long QEMU says that the guest stood still.
async fn stands_still(rounds: usize) -> Result<()> {
    println!(
        "\n### A reflink snapshot of four disks\n\n{}; {rounds} rounds on each QEMU.\n",
        machine_with_guests()
    );
    println!("| QEMU | from STOP to RESUME p50 | p99 | the whole command p50 |\n| --- | --- | --- | --- |");
    for qemu in Qemu::ALL {
        let disks = ["a", "b", "c", "d"].map(DiskSpec::new);
        let guest = Guest::spec().disks(disks).on_xfs(1200).qemu(qemu).writer(50).boot().await?;
        let cli = Cli::with_vm("vm1", &guest).await?;
        let mut qmp = guest.lab_qmp().await?;
        guest.wait_records(20).await?;
        let (mut held, mut took) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let run = cli.run(["create", "vm1", "--method", "reflink", "--name", "s"]).await?;
            took.push(run.ok()?.took.as_secs_f64());
            let at = |event: &serde_json::Value| {
                let part = |name: &str| event["timestamp"][name].as_f64().unwrap_or(f64::NAN);
                part("seconds") + part("microseconds") / 1e6
            };
            let stop = at(&qmp.event("STOP", Duration::from_secs(10)).await?);
            let resume = at(&qmp.event("RESUME", Duration::from_secs(10)).await?);
            held.push(resume - stop);
            cli.run(["delete", "vm1", "s"]).await?.ok()?;
        }
        let version = guest_version(&mut qmp).await?;
        println!(
            "| {version} | {} | {} | {} |",
            ms(percentile(&held, 0.5)),
            ms(percentile(&held, 0.99)),
            ms(percentile(&took, 0.5))
        );
    }
    println!("\nTimes in ms. Goal: under 5 ms from STOP to RESUME.");
    Ok(())
}

async fn guest_version(qmp: &mut tests::lab::RawQmp) -> Result<String> {
    let version = qmp.call("query-version", serde_json::json!({})).await?;
    let part = |name: &str| version["qemu"][name].as_u64().unwrap_or(0);
    Ok(format!("{}.{}.{}", part("major"), part("minor"), part("micro")))
}
