//! `--method internal`: snapshots inside the images, with the memory of the same instant.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::lab::{self, DiskSpec, Format, Guest, Qemu};

use crate::support::{KILLED, Scene, assert_says, two_disks};

const REFUSED: i32 = 7;
const USAGE: i32 = 2;

fn disks() -> [DiskSpec; 2] {
    [DiskSpec::new("va").iothread(), DiskSpec::new("sb").scsi().drive()]
}

/// The tags inside each image, as QEMU has them.
async fn tags(scene: &mut Scene) -> Result<Vec<usize>> {
    let blocks = scene.qmp.call("query-block", json!({})).await?;
    let inserted = blocks.as_array().context("blocks")?.iter().filter_map(|block| block.get("inserted"));
    let count = |block: &Value| block["image"]["snapshots"].as_array().map_or(0, Vec::len);
    Ok(inserted.map(count).collect())
}

async fn inside_on(qemu: Qemu) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(disks()).qemu(qemu)).await?;
    scene.set_mark("one").await?;
    let one = scene.mark().await?;
    let active = scene.active_layers().await?;
    let created = scene.run("create vm1 --method internal --name one").await?;
    assert_says(&created.ok()?.stdout, &["2 disks", "inside the images", "memory"]);
    scene.set_mark("two").await?;
    scene.run("create vm1 --method internal --name two").await?.ok()?;
    ensure!(scene.active_layers().await? == active, "the images stay the active ones");
    assert_says(&scene.run("list vm1").await?.ok()?.stdout, &["one", "memory, inside"]);
    assert_says(&scene.run("tree vm1").await?.ok()?.stdout, &["inside: one, two"]);
    assert_says(&scene.run("show vm1 one").await?.ok()?.stdout, &["inside", "snapctl-"]);
    scene.assert_sound().await?;

    let some = scene.run("revert vm1 one --disk va").await?;
    assert_says(&some.expect_code(USAGE)?.stderr, &["all disks", "--disk"]);

    // Back to the first, with its memory; what was there is kept, and one can come back to it.
    scene.guest.wait_records(3).await?;
    let reverted = scene.run("revert vm1 one").await?;
    assert_says(&reverted.ok()?.stderr, &["before-revert"]);
    ensure!(scene.mark().await? == one, "it goes on where it was");
    scene.assert_sound().await?;
    scene.run("revert vm1 two --discard").await?.ok()?;
    ensure!(scene.mark().await? != one && tags(&mut scene).await? == [3, 3], "{:?}", tags(&mut scene).await?);
    scene.assert_sound().await?;

    // Overlays above freeze what is inside: it is neither merged away nor gone back to.
    scene.run("create vm1 --name overlay").await?.ok()?;
    for line in ["revert vm1 one", "delete vm1 one"] {
        let refused = scene.run(line).await?;
        assert_says(&refused.expect_code(REFUSED)?.stderr, &["inside", "other layers stand"]);
    }
    let discard = scene.run("revert vm1 overlay").await?;
    discard.ok()?;
    scene.back_up().await?;
    // The branch is merged, and goes down into the image, which stays.
    let names = scene.names().await?;
    let branch = names.iter().rfind(|name| name.starts_with("before-revert")).context("a branch")?;
    scene.run(&format!("delete vm1 {branch} overlay")).await?.ok()?;
    ensure!(scene.active_layers().await? == active, "the images are the active ones again");
    let flatten = scene.run("flatten vm1").await?;
    assert_says(&flatten.ok()?.stdout, &["already so"]);
    scene.run("create vm1 --name again").await?.ok()?;
    scene.run("flatten vm1").await?.ok()?;
    let kept = scene.run("delete vm1 again").await?;
    assert_says(&kept.ok()?.stderr, &["stays for now", "holds snapshots inside"]);
    ensure!(active.values().all(|path| path.exists()), "no image that holds some goes away");
    scene.assert_sound().await
}

#[tokio::test]
async fn a_guest_goes_back_inside_its_images() -> Result<()> {
    inside_on(Qemu::Distro).await
}

#[tokio::test]
async fn a_guest_goes_back_inside_its_images_on_the_newer_qemu() -> Result<()> {
    inside_on(Qemu::Backports).await
}

async fn killed_on(qemu: Qemu) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(disks()).qemu(qemu)).await?;
    for point in ["begun", "saved", "recorded"] {
        let line = format!("create vm1 --method internal --name {point}");
        scene.run_faulty(&line, &format!("internal.{point}=kill")).await?.expect_code(KILLED)?;
        scene.run("recover vm1 --wait 60").await?.ok()?;
        scene.assert_sound().await.with_context(|| format!("killed at {point}"))?;
        let is_there = scene.snapshot(point).await?.is_some();
        ensure!(is_there == (point != "begun"), "killed at {point}: {is_there}");
        ensure!(tags(&mut scene).await? == vec![scene.names().await?.len(); 2], "killed at {point}");
    }
    for (point, discard) in [("kept", ""), ("loaded", ""), ("kept", "--discard"), ("loaded", "--discard")] {
        let line = format!("revert vm1 saved {discard}");
        scene.run_faulty(&line, &format!("internal.{point}=kill")).await?.expect_code(KILLED)?;
        let written = scene.guest.wait_records(3).await?;
        scene.run("recover vm1 --wait 60").await?.ok()?;
        let now = scene.guest.progress()?;
        // What the guest has written since it is back, it keeps.
        ensure!(point == "kept" || now >= written, "{point} {discard}: {written:?} {now:?}");
        scene.assert_sound().await.with_context(|| format!("killed at {point} {discard}"))?;
        ensure!(
            tags(&mut scene).await? == vec![scene.names().await?.len(); 2],
            "killed at {point} {discard}"
        );
    }
    let names = scene.names().await?.join(" ");
    let line = format!("delete vm1 {names}");
    scene.run_faulty(&line, "merge.deleted=kill").await?.expect_code(KILLED)?;
    scene.run("recover vm1 --wait 60").await?.ok()?;
    ensure!(tags(&mut scene).await? == [0, 0] && scene.names().await?.is_empty(), "none is left");
    scene.assert_sound().await?;
    scene.assert_nothing_lost().await
}

#[tokio::test]
async fn killed_at_every_point_it_is_inside_or_not() -> Result<()> {
    killed_on(Qemu::Distro).await
}

#[tokio::test]
async fn killed_at_every_point_it_is_inside_or_not_on_the_newer_qemu() -> Result<()> {
    killed_on(Qemu::Backports).await
}

#[tokio::test]
async fn a_stopped_vm_goes_back_inside_its_images() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(disks())).await?;
    scene.set_mark("one").await?;
    let one = scene.mark().await?;
    scene.run("create vm1 --method internal --name one").await?.ok()?;
    scene.set_mark("two").await?;
    scene.guest.wait_records(3).await?;
    scene.guest.kill().await?;
    let reverted = scene.run("revert vm1 one").await?;
    let (_, tag) = reverted.ok()?.stderr.split_once("-loadvm ").context("no tag")?;
    let loadvm = ["-loadvm".to_owned(), tag.trim().to_owned()];
    let active = scene.active_layers().await?;
    let Scene { guest, cli, .. } = scene;
    let guest = guest.go_on_from(loadvm, |disk| (active[disk.id()].clone(), Format::Qcow2)).await?;
    let mut scene = Scene { qmp: guest.lab_qmp().await?, guest, cli };
    ensure!(scene.mark().await? == one, "it goes on where it was");
    scene.assert_sound().await?;
    scene.guest.kill().await?;
    let names = scene.names().await?.join(" ");
    scene.run(&format!("delete vm1 {names}")).await?.ok()?;
    for image in scene.images()? {
        let list = Command::new("qemu-img").args(["snapshot", "-l"]).arg(&image).output()?;
        ensure!(list.status.success() && list.stdout.is_empty(), "{}: {list:?}", image.display());
    }
    scene.run("check vm1 --deep").await?.ok().map(drop)
}

#[tokio::test]
async fn what_cannot_be_inside_is_refused() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks())).await?;
    let raw = scene.run("create vm1 --method internal").await?;
    assert_says(&raw.expect_code(REFUSED)?.stderr, &["disk sb is raw", "--method"]);
    let some = scene.run("create vm1 --method internal --disk va").await?;
    assert_says(&some.expect_code(USAGE)?.stderr, &["all disks", "--disk"]);
    let frozen = scene.run("create vm1 --method internal --quiesce").await?;
    assert_says(&frozen.expect_code(USAGE)?.stderr, &["freeze"]);
    scene.assert_sound().await?;
    scene.guest.kill().await
}
