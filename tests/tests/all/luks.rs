//! Disks that qcow2 encrypts with LUKS: their overlays are encrypted too, with the same key, which snapctl never sees.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::lab::{self, DiskSpec, Guest, KEY, KEY_ID, Qemu, key, read_records};

use crate::support::{Scene, assert_says};

const REFUSED: i32 = 7;
/// How each record of the guest's writer begins.
const RECORD: &[u8] = b"LABREC01";

/// How many records a chain of layers holds, read with the key.
fn records(blockdev: &Value, into: &Path) -> Result<u64> {
    let _ = std::fs::remove_file(into);
    let convert = ["convert", "-U", "--object", &key(), "-O", "raw", &format!("json:{blockdev}")];
    let output = Command::new("qemu-img").args(convert).arg(into).output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(read_records(into, "raw")?.len() as u64)
}

/// The layers of the only disk up to `path`, as QEMU opens them.
async fn chain(scene: &Scene, path: &Path) -> Result<Value> {
    let mut below = Value::Null;
    for layer in scene.layers().await? {
        let file = json!({"driver": "file", "filename": layer.path});
        let encrypt = json!({"format": "luks", "key-secret": KEY_ID});
        below = json!({"driver": "qcow2", "file": file, "encrypt": encrypt, "backing": below});
        if layer.path == path {
            return Ok(below);
        }
    }
    anyhow::bail!("{} is not in the chain", path.display())
}

fn assert_no_clear_text(scene: &Scene) -> Result<()> {
    for image in scene.images()? {
        let bytes = std::fs::read(&image)?;
        ensure!(bytes.get(32..36) == Some(&2_u32.to_be_bytes()), "{}: not LUKS", image.display());
        let found = bytes.windows(RECORD.len()).any(|window| window == RECORD);
        ensure!(!found, "{}: the guest's data in clear", image.display());
    }
    Ok(())
}

async fn encrypted_on(qemu: Qemu) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disk(DiskSpec::new("va").luks()).qemu(qemu)).await?;
    let copy = scene.guest.dir().join("copy.raw");
    for name in ["a", "b", "c"] {
        let before = scene.guest.progress()?["va"];
        scene.run(&format!("create vm1 --name {name}")).await?.ok()?;
        scene.guest.wait_records(3).await?;
        let snapshot = scene.snapshot(name).await?.context("no snapshot")?;
        let path: PathBuf = snapshot["disks"][0]["path"].as_str().context("path")?.into();
        ensure!(records(&chain(&scene, &path).await?, &copy)? >= before, "{name}");
        ensure!(!snapshot.to_string().contains(KEY), "the key is nobody's but QEMU's");
    }
    scene.assert_sound().await?;
    assert_no_clear_text(&scene)?;

    scene.run("delete vm1 b").await?.ok()?;
    scene.run("delete vm1 c").await?.ok()?;
    scene.assert_sound().await?;
    scene.run("revert vm1 a").await?.ok()?;
    scene.back_up().await?;
    scene.assert_sound().await?;
    scene.run("flatten vm1").await?.ok()?;
    scene.run("create vm1 --name d").await?.ok()?;
    scene.assert_sound().await?;
    assert_no_clear_text(&scene)?;

    // What a start script asks for opens with the key.
    let synced = scene.guest.wait_records(3).await?["va"];
    scene.guest.quit().await?;
    let told = scene.run("disk path vm1 va --blockdev").await?;
    ensure!(records(&told.ok()?.json()?, &copy)? >= synced, "{told:?}");

    // Without QEMU nobody has the key.
    let dir = scene.guest.dir().join("new");
    for line in
        ["delete vm1 d", "revert vm1 d", "flatten vm1", &format!("revert vm1 d --to-new {}", dir.display())]
    {
        let refused = scene.run(line).await?;
        assert_says(&refused.expect_code(REFUSED)?.stderr, &["encrypted", "start vm1"]);
    }
    scene.run("check vm1 --deep").await?.ok()?;
    Ok(())
}

#[tokio::test]
async fn encrypted_disks_stay_encrypted() -> Result<()> {
    encrypted_on(Qemu::Distro).await
}

#[tokio::test]
async fn encrypted_disks_stay_encrypted_on_the_newer_qemu() -> Result<()> {
    encrypted_on(Qemu::Backports).await
}
