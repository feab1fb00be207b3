//! A file system that is full in the middle of a merge (Q8): the job waits, and nothing is lost.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tests::lab::{self, DiskSpec, Guest, Qemu};

use crate::support::{Scene, Stopped, Tmpfs, assert_says, two_disks};

const MIB: usize = 1 << 20;
const INTERRUPTED: i32 = 8;

/// Writes to the disk as its guest would, from one MiB to another.
async fn write(scene: &mut Scene, byte: u8, from: usize, mib: usize) -> Result<()> {
    let line = format!("qemu-io -d /machine/peripheral/sm/virtio-backend \"write -P {byte} {from}M {mib}M\"");
    let said = scene.qmp.call("human-monitor-command", json!({"command-line": line})).await?;
    // What it wrote it tells elsewhere; here it would say what went wrong.
    ensure!(said == "", "{said}");
    Ok(())
}

/// The layer that snapshot `name` holds reads as these runs of bytes, by the MiB.
async fn assert_reads(scene: &Scene, name: &str, runs: &[(u8, usize)], into: &Path) -> Result<()> {
    let snapshot = scene.snapshot(name).await?.with_context(|| format!("there is no {name}"))?;
    let layers = snapshot["disks"].as_array().context("disks")?;
    let layer = layers.iter().find(|layer| layer["disk"] == "sm").context("no sm")?;
    let (path, format) =
        (layer["path"].as_str().context("path")?, layer["format"].as_str().context("format")?);
    let convert = ["convert", "-U", "-f", format, "-O", "raw", path];
    let output = Command::new("qemu-img").args(convert).arg(into).output()?;
    ensure!(output.status.success(), "{output:?}");
    let bytes = fs::read(into)?;
    let mut at = 0;
    for (byte, mib) in runs {
        let run = &bytes[at..at + mib * MIB];
        ensure!(run.iter().all(|found| found == byte), "{name}: not {byte} at {} MiB", at / MIB);
        at += mib * MIB;
    }
    Ok(())
}

/// Takes all the room that there is.
fn fill(small: &Tmpfs) -> Result<PathBuf> {
    let filler = small.path().join("filler");
    let mut file = File::create(&filler)?;
    for piece in [MIB, 4096] {
        while file.write_all(&vec![1; piece]).is_ok() {}
    }
    Ok(filler)
}

/// Lets the command go on into a full file system, and waits until its job has noticed.
async fn run_into_it(scene: &mut Scene, small: &Tmpfs, line: &str) -> Result<(Stopped, PathBuf)> {
    let stopped = scene.stop_at(line, "merge.started").await?;
    let filler = fill(small)?;
    loop {
        let jobs = scene.qmp.call("query-block-jobs", json!({})).await?;
        let jobs = jobs.as_array().context("jobs")?.clone();
        ensure!(!jobs.is_empty(), "the job has ended, and was to wait");
        if jobs.iter().all(|job| job["io-status"] == "nospace") {
            return Ok((stopped, filler));
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

async fn q8_on(qemu: Qemu) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let Some(small) = Tmpfs::mount("size=160m")? else { return Ok(()) };
    let image = small.path().join("small.raw");
    File::create(&image)?.set_len(64 << 20)?;
    let disk = DiskSpec::new("sm").raw().blank().image(&image);
    let mut scene = Scene::boot(Guest::spec().disks(two_disks()).disk(disk).qemu(qemu)).await?;
    let copy = scene.guest.dir().join("copy.raw");
    for (name, byte, from) in [("a", 1, 0), ("b", 2, 8), ("c", 3, 16)] {
        write(&mut scene, byte, from, 8).await?;
        scene.run(&format!("create vm1 --name {name} --disk sm")).await?.ok()?;
    }
    write(&mut scene, 4, 24, 1).await?;

    // Room appears while it waits.
    let line = "delete vm1 a --bandwidth 2M --wait-for-room 60s";
    let (stopped, filler) = run_into_it(&mut scene, &small, line).await?;
    let freed = async {
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        fs::remove_file(&filler)
    };
    let (ended, freed) = tokio::join!(stopped.go_on(), freed);
    freed?;
    let ended = ended?;
    assert_says(&ended.expect_code(0)?.stderr, &["no room is left", "nothing is lost"]);
    assert_reads(&scene, "b", &[(1, 8), (2, 8), (0, 8)], &copy).await?;

    // None appears: what is left to be merged is left for later.
    let line = "delete vm1 b --bandwidth 2M --wait-for-room 1s";
    let (stopped, filler) = run_into_it(&mut scene, &small, line).await?;
    let ended = stopped.go_on().await?;
    assert_says(&ended.expect_code(INTERRUPTED)?.stderr, &["no room is left", "are deleted", "recover vm1"]);
    assert_reads(&scene, "c", &[(1, 8), (2, 8), (3, 8)], &copy).await?;
    fs::remove_file(&filler)?;
    scene.run("recover vm1").await?.ok()?;
    assert_reads(&scene, "c", &[(1, 8), (2, 8), (3, 8)], &copy).await?;
    scene.assert_sound().await?;
    let tree = scene.run("tree vm1").await?;
    ensure!(!tree.ok()?.stdout.contains("(no snapshot)"), "{tree:?}");
    scene.guest.kill().await
}

#[tokio::test]
async fn q8_a_merge_waits_for_room_and_loses_nothing() -> Result<()> {
    q8_on(Qemu::Distro).await
}

#[tokio::test]
async fn q8_a_merge_waits_for_room_and_loses_nothing_on_the_newer_qemu() -> Result<()> {
    q8_on(Qemu::Backports).await
}
