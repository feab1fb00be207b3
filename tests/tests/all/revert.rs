//! `snapctl revert` on real guests: they start again from the snapshot's disks, and what came after it is a branch. And
//! what a crash leaves of it.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use tests::lab::{self, DiskSpec, Guest, Progress, Qemu, read_records};

use crate::support::{KILLED, Scene, assert_says, two_disks};

const POINTS: &str =
    "begun files opened prepared paused pivoted switched sealed entered reset resumed closed removed";
/// The first point at which a disk is switched.
const PIVOTED: &str = "pivoted";

fn kinds() -> [DiskSpec; 4] {
    [
        DiskSpec::new("va").iothread(),
        DiskSpec::new("vb").raw().throttle(),
        DiskSpec::new("sc").scsi().drive(),
        DiskSpec::new("sd").scsi().raw().drive(),
    ]
}

/// Takes a snapshot, and returns what was synced before it.
async fn take(scene: &Scene, name: &str) -> Result<Progress> {
    let before = scene.guest.wait_records(3).await?;
    scene.run(&format!("create vm1 --name {name}")).await?.ok()?;
    Ok(before)
}

async fn branch(scene: &Scene) -> Result<Option<String>> {
    Ok(scene.names().await?.into_iter().rfind(|name| name.starts_with("before-revert-")))
}

async fn assert_whole(scene: &Scene, name: &str, before: &Progress) -> Result<()> {
    let snapshot = scene.snapshot(name).await?.with_context(|| format!("there is no {name}"))?;
    scene.assert_whole(&snapshot, before).with_context(|| name.to_owned())
}

/// How many records the guest finds on each disk, without ending it: those of the layers below its active one.
fn records_below(snapshot: &serde_json::Value, disk: &str) -> Result<u64> {
    let layers = snapshot["disks"].as_array().context("disks")?;
    let layer = layers.iter().find(|layer| layer["disk"] == disk).context("the disk")?;
    let path = PathBuf::from(layer["path"].as_str().context("path")?);
    Ok(read_records(&path, layer["format"].as_str().context("format")?)?.len() as u64)
}

async fn there_and_back_on(qemu: Qemu) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(kinds()).qemu(qemu)).await?;
    let a = take(&scene, "a").await?;
    let b = take(&scene, "b").await?;
    let last = scene.guest.wait_records(3).await?;
    let planned = scene.run("revert vm1 a --dry-run").await?;
    assert_says(&planned.ok()?.stdout, &["hold the guest", "reset the guest", "before-revert-"]);
    ensure!(branch(&scene).await?.is_none(), "a dry run did it");

    let reverted = scene.run("revert vm1 a").await?;
    assert_says(&reverted.ok()?.stdout, &["went back to snapshot a", "starts again"]);
    scene.back_up().await?;
    scene.assert_sound().await?;
    let kept = branch(&scene).await?.context("what came after is not kept")?;
    for (name, before) in [("a", &a), ("b", &b), (kept.as_str(), &last)] {
        assert_whole(&scene, name, before).await?;
    }
    // The guest writes on from what was in the snapshot: fewer records than before.
    let at_a = scene.snapshot("a").await?.context("a")?;
    let new = take(&scene, "c").await?;
    let at_c = scene.snapshot("c").await?.context("c")?;
    for disk in scene.guest.mounted() {
        ensure!(records_below(&at_c, disk.id())? > records_below(&at_a, disk.id())?, "{}", disk.id());
    }
    ensure!(at_c["parent"] == at_a["id"], "{at_c}");
    let tree = scene.run("tree vm1").await?;
    assert_says(&tree.ok()?.stdout, &["│  ├─ b", &format!("└─ {kept}")]);

    // And back to where it was, which throws away what came after c.
    scene.run(&format!("revert vm1 {kept} --discard")).await?.ok()?;
    scene.back_up().await?;
    scene.assert_sound().await?;
    assert_whole(&scene, "c", &new).await?;
    assert_whole(&scene, &kept, &last).await?;

    // Everything but the active layers can go.
    scene.run(&format!("delete vm1 a b c {kept}")).await?.ok()?;
    scene.assert_sound().await?;
    ensure!(scene.layers().await?.iter().all(|layer| layer.active), "layers are left");
    let mut synced = scene.guest.progress()?;
    // It came back to where it had been, and went on.
    for (disk, records) in &mut synced {
        *records = last[disk].max(*records);
    }
    scene.guest.kill().await?;
    scene.assert_active_layers_hold(&synced).await
}

#[tokio::test]
async fn a_guest_goes_there_and_back() -> Result<()> {
    there_and_back_on(Qemu::Distro).await
}

#[tokio::test]
async fn a_guest_goes_there_and_back_on_the_newer_qemu() -> Result<()> {
    there_and_back_on(Qemu::Backports).await
}

#[tokio::test]
async fn a_stopped_vm_goes_back_and_starts_there() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks())).await?;
    let a = take(&scene, "a").await?;
    let last = take(&scene, "b").await?;
    scene.guest.kill().await?;
    // One disk first, then what the other one holds.
    let run = scene.run("revert vm1 a --disk va").await?;
    assert_says(&run.ok()?.stderr, &["sb stays as it is"]);
    scene.run("revert vm1 a --disk sb --discard").await?.ok()?;
    scene.run("check vm1").await?.ok()?;
    let kept = branch(&scene).await?.context("what came after is not kept")?;
    ensure!(scene.snapshot(&kept).await?.context("it")?["disks"].as_array().map(Vec::len) == Some(1));
    assert_whole(&scene, "a", &a).await?;
    assert_whole(&scene, "b", &last).await?;

    let mut scene = scene.start_again().await?;
    scene.assert_sound().await?;
    assert_whole(&scene, "a", &a).await
}

/// The layers of a branch are in no VM: the storage daemon merges them while the VM runs beside.
#[tokio::test]
async fn a_branch_is_merged_beside_the_running_vm() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks())).await?;
    let a = take(&scene, "a").await?;
    take(&scene, "b").await?;
    // The layer that goes holds more than the end of the branch: that one is copied down.
    scene.guest.shell("for d in /data/*; do dd if=/dev/zero of=$d/ballast bs=1M count=4; done; sync").await?;
    let c = take(&scene, "c").await?;
    let d = take(&scene, "d").await?;
    let last = scene.guest.wait_records(3).await?;
    scene.run("revert vm1 a").await?.ok()?;
    scene.back_up().await?;
    let kept = branch(&scene).await?.context("what came after is not kept")?;
    for going in ["c", "b", "d"] {
        scene.run(&format!("delete vm1 {going}")).await?.ok().with_context(|| going.to_owned())?;
        scene.assert_sound().await.with_context(|| going.to_owned())?;
        for (name, before) in [("a", &a), ("c", &c), ("d", &d), (kept.as_str(), &last)] {
            if scene.snapshot(name).await?.is_some() {
                assert_whole(&scene, name, before).await.with_context(|| format!("after {going}"))?;
            }
        }
    }
    // And a branch goes as a whole.
    scene.run(&format!("delete vm1 {kept}")).await?.ok()?;
    scene.assert_sound().await?;
    assert_whole(&scene, "a", &a).await
}

#[tokio::test]
async fn what_cannot_be_reverted_is_refused() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks())).await?;
    let before = take(&scene, "whole").await?;
    scene.run("create vm1 --name half --disk va").await?.ok()?;
    for (line, code, words) in [
        ("revert vm1 none", 6, vec!["has no snapshot none", "there are: whole, half"]),
        ("revert vm1 half --disk sb", 6, vec!["does not hold disk sb", "snapctl show vm1 half"]),
        ("revert vm1 whole --disk vz", 6, vec!["has no disk named vz"]),
        ("revert vm1", 2, vec!["SNAP"]),
    ] {
        let run = scene.run(line).await?;
        assert_says(&run.expect_code(code)?.stderr, &words);
    }
    scene.assert_sound().await?;
    // Of a snapshot of one disk the other one stays.
    assert_says(&scene.run("revert vm1 half --dry-run").await?.ok()?.stderr, &["sb stays as it is"]);
    assert_whole(&scene, "whole", &before).await
}

async fn killed_everywhere_on(qemu: Qemu, discard: &str) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks()).qemu(qemu)).await?;
    let a = take(&scene, "a").await?;
    let pivoted = POINTS.split(' ').position(|point| point == PIVOTED);
    for (at, point) in POINTS.split(' ').enumerate() {
        killed_at(&mut scene, point, discard, Some(at) >= pivoted, &a)
            .await
            .with_context(|| point.to_owned())?;
    }
    Ok(())
}

async fn killed_at(scene: &mut Scene, point: &str, discard: &str, done: bool, a: &Progress) -> Result<()> {
    let last = scene.guest.wait_records(2).await?;
    let before = branch(scene).await?;
    let line = format!("revert vm1 a {discard}");
    scene.run_faulty(&line, &format!("revert.{point}=kill")).await?.expect_code(KILLED)?;
    scene.run("recover vm1 --wait 60").await?.ok()?;
    scene.assert_settled().await?;
    let kept = branch(scene).await?;
    ensure!((kept != before) == (done && discard.is_empty()), "done {done}: {before:?}, then {kept:?}");
    if done {
        scene.back_up().await?;
    }
    scene.assert_sound().await?;
    assert_whole(scene, "a", a).await?;
    if let Some(kept) = kept.filter(|kept| done && before.as_ref() != Some(kept)) {
        assert_whole(scene, &kept, &last).await?;
        scene.run(&format!("delete vm1 {kept}")).await?.ok()?;
    }
    Ok(())
}

#[tokio::test]
async fn killed_at_every_point_it_is_done_or_not() -> Result<()> {
    killed_everywhere_on(Qemu::Distro, "").await
}

#[tokio::test]
async fn killed_at_every_point_what_is_discarded_is_gone_or_not_on_the_newer_qemu() -> Result<()> {
    killed_everywhere_on(Qemu::Backports, "--discard").await
}
