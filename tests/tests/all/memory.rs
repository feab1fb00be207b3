//! `snapctl create --memory`: a guest goes on from the instant of the snapshot, as if nothing had been.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use tests::lab::{self, Format, Guest, Qemu};

use crate::support::{KILLED, Scene, assert_says, memory_of, two_disks};

const REFUSED: i32 = 7;
const USAGE: i32 = 2;

/// What `revert` prints for QEMU, as a shell splits it, with what it says has to be done before.
fn incoming(said: &str) -> Result<Vec<String>> {
    let (_, told) = said.split_once("tells, and: ").context("no -incoming")?;
    let told = told.lines().next().context("nothing")?;
    let (options, before) = told.split_once(", behind: ").unwrap_or((told, "true"));
    let sh = |line: &str| std::process::Command::new("sh").args(["-c", line]).output();
    ensure!(sh(before)?.status.success(), "{before}");
    let words = String::from_utf8(sh(&format!("printf '%s\\n' {options}"))?.stdout)?;
    Ok(words.lines().map(str::to_owned).collect())
}

async fn goes_on_from(qemu: Qemu, how: &str, method: &str) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks()).qemu(qemu)).await?;
    scene.set_mark("then").await?;
    let then = scene.mark().await?;
    let before = scene.guest.progress()?;
    let created = scene.run(&format!("create vm1 --memory{how} --name m")).await?;
    assert_says(&created.ok()?.stdout, &["of memory", method, "stood still"]);
    let after = scene.guest.wait_records(3).await?;
    scene.set_mark("later").await?;
    scene.assert_sound().await?;
    assert_says(&scene.run("show vm1 m").await?.ok()?.stdout, &["memory", method, "q35"]);
    assert_says(&scene.run("list vm1").await?.ok()?.stdout, &["memory"]);

    scene.guest.kill().await?;
    let reverted = scene.run("revert vm1 m").await?;
    let options = incoming(&reverted.ok()?.stderr)?;
    let active: BTreeMap<String, PathBuf> = scene.active_layers().await?;
    let Scene { guest, cli, .. } = scene;
    let raw = options.last().and_then(|word| word.strip_prefix("file:")).map(PathBuf::from);
    let guest = guest.go_on_from(options, |disk| (active[disk.id()].clone(), Format::Qcow2)).await?;
    let mut scene = Scene { qmp: guest.lab_qmp().await?, guest, cli };
    // What was decompressed for it is not needed any more.
    raw.map_or(Ok(()), std::fs::remove_file)?;
    let status = scene.qmp.call("query-status", json!({})).await?;
    ensure!(status["running"] == true, "{status}");
    ensure!(scene.mark().await? == then, "it goes on where it was");
    // The numbers go on from those of that instant, on disks of that instant.
    let now = scene.guest.wait_records(3).await?;
    ensure!(now.iter().all(|(disk, count)| *count > before[disk]), "{before:?} {now:?} {after:?}");
    scene.assert_sound().await?;

    // With the snapshot its memory goes.
    let memory = memory_of(&scene.snapshot("m").await?.context("m")?).context("memory")?;
    scene.run("delete vm1 m").await?.ok()?;
    ensure!(!memory.exists(), "{}", memory.display());
    scene.assert_nothing_lost().await
}

#[tokio::test]
async fn a_stopped_guest_goes_on() -> Result<()> {
    goes_on_from(Qemu::Distro, "", "stop").await
}

#[tokio::test]
async fn a_guest_goes_on_on_the_newer_qemu() -> Result<()> {
    goes_on_from(Qemu::Backports, "", "live").await
}

#[tokio::test]
async fn a_stopped_guest_goes_on_from_mapped_memory_on_the_newer_qemu() -> Result<()> {
    goes_on_from(Qemu::Backports, "=stop", "stop").await
}

async fn killed_at_every_point_on(qemu: Qemu, how: &str) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks()).qemu(qemu)).await?;
    let points = ["held", "switched", "saving", "saved", "compressed", "verified", "recorded"];
    for point in points {
        let before = scene.guest.wait_records(3).await?;
        let line = format!("create vm1 --memory={how} --name {point}");
        let run = scene.run_faulty(&line, &format!("create.{point}=kill")).await?;
        run.expect_code(KILLED)?;
        scene.guest.wait_records(3).await.with_context(|| format!("killed at {point}: it stands still"))?;
        scene.run("recover vm1 --wait 60").await?.ok()?;
        scene.assert_sound().await.with_context(|| format!("killed at {point}"))?;
        if let Some(snapshot) = scene.snapshot(point).await? {
            scene.assert_whole(&snapshot, &before).with_context(|| format!("killed at {point}"))?;
            let is_late = ["saved", "compressed", "verified", "recorded"].contains(&point);
            ensure!(!is_late || memory_of(&snapshot).is_some(), "killed at {point}: no memory");
        }
        let settings = scene.qmp.call("query-migrate-capabilities", json!({})).await?;
        let settings = settings.as_array().context("capabilities")?;
        let on: Vec<_> = settings.iter().filter(|setting| setting["state"] == true).collect();
        ensure!(on.is_empty(), "killed at {point}: {on:?}");
    }
    scene.guest.kill().await
}

#[tokio::test]
async fn killed_at_every_point_while_the_guest_stands_still() -> Result<()> {
    killed_at_every_point_on(Qemu::Distro, "stop").await
}

#[tokio::test]
async fn killed_at_every_point_while_the_guest_stands_still_on_the_newer_qemu() -> Result<()> {
    killed_at_every_point_on(Qemu::Backports, "stop").await
}

#[tokio::test]
async fn killed_at_every_point_while_the_guest_runs_on() -> Result<()> {
    killed_at_every_point_on(Qemu::Backports, "live").await
}

#[tokio::test]
async fn what_cannot_be_saved_is_refused_and_a_signal_takes_it_back() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks())).await?;
    let live = scene.run("create vm1 --memory=live").await?;
    assert_says(&live.expect_code(REFUSED)?.stderr, &["live", "hangs", "--memory=stop"]);
    let frozen = scene.run("create vm1 --memory --quiesce").await?;
    assert_says(&frozen.expect_code(USAGE)?.stderr, &["freeze", "--quiesce"]);
    scene.qmp.call("stop", json!({})).await?;
    let paused = scene.run("create vm1 --memory").await?;
    assert_says(&paused.expect_code(REFUSED)?.stderr, &["paused", "cont"]);
    scene.qmp.call("cont", json!({})).await?;

    let stopped = scene.stop_at("create vm1 --memory=stop", "create.saving").await?;
    stopped.signal(Signal::INT)?;
    assert_says(&stopped.go_on().await?.expect_code(130)?.stderr, &["SIGINT", "everything was undone"]);
    scene.assert_sound().await?;
    ensure!(scene.snapshots().await?.is_empty(), "none was taken");
    scene.guest.kill().await
}

#[tokio::test]
async fn memory_that_is_lost_or_damaged_is_found_and_a_running_vm_is_told_why_it_is_not_loaded() -> Result<()>
{
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks())).await?;
    scene.run("create vm1 --memory --name m").await?.ok()?;
    let reverted = scene.run("revert vm1 m").await?;
    assert_says(&reverted.ok()?.stderr, &["was not loaded", "stop the VM", "revert vm1 m"]);
    let memory = memory_of(&scene.snapshot("m").await?.context("m")?).context("memory")?;
    let bytes = std::fs::read(&memory)?;
    std::fs::remove_file(&memory)?;
    assert_says(&scene.run("check vm1").await?.stdout, &["lost-memory", "damaged"]);
    std::fs::write(&memory, &bytes[..bytes.len() / 2])?;
    scene.run("check vm1").await?.ok()?;
    assert_says(&scene.run("check vm1 --deep").await?.stdout, &["damaged-memory", "snapshot m"]);
    scene.guest.kill().await
}

#[tokio::test]
async fn qemu_killed_while_memory_is_written_leaves_the_disks() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks()).qemu(Qemu::Backports)).await?;
    let before = scene.guest.progress()?;
    let stopped = scene.stop_at("create vm1 --memory --name m", "create.saving").await?;
    // The first of them may have been synced before the point, and told behind it.
    scene.guest.wait_records(3).await?;
    scene.guest.kill().await?;
    ensure!(stopped.go_on().await?.code != 0, "it has lost its QEMU");
    scene.run("recover vm1").await?.ok()?;
    let snapshot = scene.snapshot("m").await?.context("the point was made")?;
    scene.assert_whole(&snapshot, &before)?;
    ensure!(memory_of(&snapshot).is_none(), "its memory was not");
    scene.run("check vm1 --deep").await?.ok()?;
    let stray: Vec<PathBuf> =
        scene.images()?.into_iter().filter(|path| path.to_string_lossy().contains("memory")).collect();
    ensure!(stray.is_empty(), "{stray:?}");
    Ok(())
}
