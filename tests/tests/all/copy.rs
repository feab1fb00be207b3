//! `snapctl revert VM SNAP --to-new DIR`: a copy that stands alone, and a VM that is as it was.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tests::lab::{self, Guest, Progress, Qemu, read_records};

use crate::support::{KILLED, Scene, assert_says, two_disks};

const REFUSED: i32 = 7;
const USAGE: i32 = 2;
const NOT_FOUND: i32 = 6;

/// Each copy is one image without a backing file, and holds what was synced before the snapshot.
fn assert_copies(dir: &Path, before: &Progress) -> Result<()> {
    for (disk, synced) in before {
        let copy = dir.join(format!("{disk}.qcow2"));
        let info = Command::new("qemu-img")
            .args(["info", "--backing-chain", "--output=json"])
            .arg(&copy)
            .output()?;
        let info: Value = serde_json::from_slice(&info.stdout).with_context(|| copy.display().to_string())?;
        ensure!(info.as_array().is_some_and(|chain| chain.len() == 1), "{info}");
        let records = read_records(&copy, "qcow2")?.len() as u64;
        ensure!(records >= *synced, "{disk}: {records} of {synced}");
    }
    Ok(())
}

fn files(dir: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(dir)?;
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

async fn stands_alone_on(qemu: Qemu) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks()).qemu(qemu)).await?;
    let place = tempfile::tempdir()?;
    let into = |name: &str| -> (PathBuf, String) {
        let dir = place.path().join(name);
        (dir.clone(), format!("revert vm1 b --to-new {}", dir.display()))
    };
    scene.run("create vm1 --name a").await?.ok()?;
    let before = scene.guest.wait_records(3).await?;
    scene.run("create vm1 --name b").await?.ok()?;
    scene.guest.wait_records(3).await?;

    let (dir, line) = into("one");
    let plan = scene.run(&format!("{line} --dry-run")).await?;
    assert_says(&plan.ok()?.stdout, &["would be copied", "at most", "va.qcow2", "undo: remove"]);
    ensure!(!dir.exists(), "a plan makes nothing");
    let active = scene.active_layers().await?;
    assert_says(&scene.run(&line).await?.ok()?.stdout, &["the VM is as it was", "va.qcow2", "sb.qcow2"]);
    assert_copies(&dir, &before)?;
    ensure!(scene.active_layers().await? == active, "the VM goes on where it was");
    scene.assert_sound().await?;
    let again = scene.run(&line).await?;
    assert_says(&again.expect_code(REFUSED)?.stderr, &["exists already", "another directory"]);
    scene.run(&format!("{line} --discard")).await?.expect_code(USAGE)?;
    let other = scene.run(&format!("{} --disk cd0", into("none").1)).await?;
    assert_says(&other.expect_code(NOT_FOUND)?.stderr, &["does not hold disk cd0"]);

    // Killed, it leaves what is whole, and a second attempt is not in its way.
    for (point, whole) in [("begun", 0), ("converted", 0), ("renamed", 1)] {
        let (dir, line) = into(point);
        scene.run_faulty(&line, &format!("copy.{point}=kill")).await?.expect_code(KILLED)?;
        let images = files(&dir)?.into_iter().filter(|name| name.ends_with(".qcow2"));
        let images: Vec<String> = images.collect();
        ensure!(images.len() == whole, "{point}: {images:?}");
        images.iter().try_for_each(|image| std::fs::remove_file(dir.join(image)))?;
        scene.run(&line).await?.ok()?;
        assert_copies(&dir, &before)?;
        ensure!(files(&dir)?.len() == 2, "{point}: {:?}", files(&dir)?);
    }

    // A signal takes everything back.
    let (dir, line) = into("signal");
    let stopped = scene.stop_at(&line, "copy.converted").await?;
    stopped.signal(Signal::TERM)?;
    stopped.go_on().await?.expect_code(143)?;
    ensure!(!dir.exists(), "{:?}", files(&dir));

    scene.guest.kill().await?;
    let (dir, line) = into("stopped");
    scene.run(&line).await?.ok()?;
    assert_copies(&dir, &before)
}

#[tokio::test]
async fn a_copy_stands_alone_and_the_vm_is_as_it_was() -> Result<()> {
    stands_alone_on(Qemu::Distro).await
}

#[tokio::test]
async fn a_copy_stands_alone_and_the_vm_is_as_it_was_on_the_newer_qemu() -> Result<()> {
    stands_alone_on(Qemu::Backports).await
}
