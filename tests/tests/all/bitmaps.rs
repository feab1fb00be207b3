//! Dirty bitmaps follow the disk: an incremental backup after snapshots, deletions and a restart misses nothing.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::lab::{self, DiskSpec, Guest, Qemu};

use crate::support::{Scene, assert_says};

const BITMAP: &str = "daily";
const REFUSED: i32 = 7;
/// Longer than a backup here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// A raw image that is kept like the disk by backups: all of it at first, then what the bitmap tells.
struct Backup {
    disk: String,
    target: PathBuf,
}

/// The node that holds the active layer of `disk`, and its bitmaps by name.
async fn active(scene: &mut Scene, disk: &str) -> Result<(String, Vec<Value>)> {
    let blocks = scene.qmp.call("query-block", json!({})).await?;
    let is_it = |block: &&Value| {
        let qdev = block["qdev"].as_str().unwrap_or_default();
        block["device"] == disk || qdev == disk || qdev.split('/').any(|part| part == disk)
    };
    let blocks = blocks.as_array().context("blocks")?;
    let block = blocks.iter().find(is_it).with_context(|| format!("no {disk} in {blocks:?}"))?;
    let node = block["inserted"]["node-name"].as_str().context("node")?.to_owned();
    Ok((node, block["inserted"]["dirty-bitmaps"].as_array().cloned().unwrap_or_default()))
}

impl Backup {
    /// Takes all of the disk, and lets a bitmap record from then on.
    async fn begin(scene: &mut Scene, disk: &str, persistent: bool) -> Result<Self> {
        let (node, _) = active(scene, disk).await?;
        let target = scene.guest.dir().join(format!("{disk}.backup"));
        let size = scene.qmp.call("query-block", json!({})).await?;
        let size = size.as_array().context("blocks")?.iter();
        let mut sizes = size.filter(|block| block["inserted"]["node-name"] == node);
        let size = sizes.next().context("size")?["inserted"]["image"]["virtual-size"].as_u64();
        File::create(&target)?.set_len(size.context("size")?)?;
        let this = Self { disk: disk.to_owned(), target };
        scene.qmp.call("stop", json!({})).await?;
        let add = json!({"node": node, "name": BITMAP, "persistent": persistent});
        scene.qmp.call("block-dirty-bitmap-add", add).await?;
        this.copy(scene, json!({"sync": "full"})).await?;
        scene.qmp.call("cont", json!({})).await?;
        Ok(this)
    }

    async fn copy(&self, scene: &mut Scene, how: Value) -> Result<()> {
        let (node, _) = active(scene, &self.disk).await?;
        let file = json!({"driver": "file", "filename": self.target});
        scene.qmp.call("blockdev-add", json!({"driver": "raw", "node-name": "tgt", "file": file})).await?;
        let mut job = json!({"job-id": "backup0", "device": node, "target": "tgt"});
        job.as_object_mut().context("job")?.extend(how.as_object().context("how")?.clone());
        scene.qmp.call("blockdev-backup", job).await?;
        let ended = loop {
            let ended = scene.qmp.event("BLOCK_JOB_COMPLETED", PATIENCE).await?;
            // Merges of layers end too.
            if ended["data"]["device"] == "backup0" {
                break ended;
            }
        };
        ensure!(ended["data"].get("error").is_none(), "{ended}");
        scene.qmp.call("blockdev-del", json!({"node-name": "tgt"})).await.map(drop)
    }

    /// After an incremental backup the image is the disk: the bitmap told all that was written since.
    async fn assert_misses_nothing(&self, scene: &mut Scene) -> Result<()> {
        let (_, bitmaps) = active(scene, &self.disk).await?;
        ensure!(bitmaps.len() == 1 && bitmaps[0]["name"] == BITMAP, "{}: {bitmaps:?}", self.disk);
        scene.qmp.call("stop", json!({})).await?;
        self.copy(scene, json!({"sync": "bitmap", "bitmap": BITMAP, "bitmap-mode": "never"})).await?;
        let layer = scene.active_layers().await?[&self.disk].clone();
        assert_same(&self.target, &layer)?;
        scene.qmp.call("cont", json!({})).await.map(drop)
    }
}

/// QEMU holds the layer, and its guest stands still: what it flushed is in the file.
fn assert_same(backup: &Path, layer: &Path) -> Result<()> {
    let format = if layer.extension().is_some_and(|end| end == "raw") { "raw" } else { "qcow2" };
    let compare = ["compare", "-U", "-f", "raw", "-F", format];
    let output = Command::new("qemu-img").args(compare).args([backup, layer]).output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

async fn nothing_is_missed_on(qemu: Qemu) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let disks = [DiskSpec::new("va"), DiskSpec::new("sb").raw().scsi().drive()];
    let mut scene = Scene::boot(Guest::spec().disks(disks).qemu(qemu)).await?;
    let backups =
        [Backup::begin(&mut scene, "va", true).await?, Backup::begin(&mut scene, "sb", false).await?];
    for (line, what) in [
        ("create vm1 --name a", "a snapshot"),
        ("create vm1 --name b", "another"),
        ("create vm1 --name c", "a third"),
        ("delete vm1 b", "deleting an inner one"),
        ("delete vm1 a c", "deleting the others"),
        ("create vm1 --name d", "a new one"),
        ("flatten vm1", "flattening"),
    ] {
        scene.guest.wait_records(3).await?;
        scene.run(line).await?.ok()?;
        scene.guest.wait_records(3).await?;
        for backup in &backups {
            backup.assert_misses_nothing(&mut scene).await.with_context(|| format!("after {what}"))?;
        }
    }
    scene.assert_sound().await?;
    scene.guest.kill().await
}

#[tokio::test]
async fn nothing_is_missed_after_snapshots_and_deletions() -> Result<()> {
    nothing_is_missed_on(Qemu::Distro).await
}

#[tokio::test]
async fn nothing_is_missed_after_snapshots_and_deletions_on_the_newer_qemu() -> Result<()> {
    nothing_is_missed_on(Qemu::Backports).await
}

#[tokio::test]
async fn a_bitmap_goes_down_with_a_stopped_vm_and_is_gone_after_a_revert() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disk(DiskSpec::new("va"))).await?;
    let backup = Backup::begin(&mut scene, "va", true).await?;
    for name in ["a", "b"] {
        scene.run(&format!("create vm1 --name {name}")).await?.ok()?;
        scene.guest.wait_records(3).await?;
    }
    // An orderly end: a bitmap that QEMU could not keep is worth nothing.
    scene.guest.quit().await?;
    scene.run("delete vm1 a b").await?.ok()?;
    let mut scene = scene.start_again().await?;
    scene.back_up().await?;
    backup.assert_misses_nothing(&mut scene).await?;

    scene.run("create vm1 --name c").await?.ok()?;
    scene.run("revert vm1 c").await?.ok()?;
    let (_, bitmaps) = active(&mut scene, "va").await?;
    ensure!(bitmaps.is_empty(), "what came before the revert says nothing: {bitmaps:?}");
    // The layer of the branch has it still; committed down, it must not come back.
    scene.run("delete vm1 c").await?.ok()?;
    let (_, bitmaps) = active(&mut scene, "va").await?;
    ensure!(bitmaps.is_empty(), "{bitmaps:?}");
    scene.guest.kill().await
}

#[tokio::test]
async fn a_bitmap_in_use_is_refused() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disk(DiskSpec::new("va"))).await?;
    let (node, _) = active(&mut scene, "va").await?;
    let bitmap = json!({"node": node, "name": BITMAP, "disabled": true});
    scene.qmp.call("block-dirty-bitmap-add", bitmap).await?;
    let socket = scene.guest.dir().join("nbd");
    let address = json!({"addr": {"type": "unix", "data": {"path": socket}}});
    scene.qmp.call("nbd-server-start", address).await?;
    let export = json!({"type": "nbd", "id": "e", "node-name": node, "bitmaps": [BITMAP]});
    scene.qmp.call("block-export-add", export).await?;
    let refused = scene.run("create vm1").await?;
    assert_says(&refused.expect_code(REFUSED)?.stderr, &[BITMAP, "in use", "backup"]);
    scene.assert_nothing_leaked().await?;
    scene.guest.kill().await
}
