//! `snapctl check --deep`: frozen layers that were written to behind snapctl's back are found and named.

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::lab::{self, Guest};

use crate::support::{Scene, assert_says, two_disks};

/// What `snapctl` exits with where it finds damage.
const DAMAGE: i32 = 13;

/// Changes one byte at `offset` of a sealed layer, as a careless root would.
fn damage(path: &Path, offset: u64, keep_times: bool) -> Result<()> {
    // A file system without the attribute has nothing to take off.
    Command::new("chattr").arg("-i").arg(path).output()?;
    let metadata = fs::metadata(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[!byte[0]], offset)?;
    if keep_times {
        file.set_times(FileTimes::new().set_modified(metadata.modified()?))?;
    }
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o400))?)
}

/// The layer of disk `disk` that snapshot `name` holds.
async fn layer(scene: &Scene, name: &str, disk: &str) -> Result<PathBuf> {
    let snapshot = scene.snapshot(name).await?.with_context(|| format!("there is no {name}"))?;
    let layers = snapshot["disks"].as_array().context("disks")?;
    let layer = layers.iter().find(|layer| layer["disk"] == disk).context("no such disk")?;
    Ok(layer["path"].as_str().context("path")?.into())
}

/// What `check --deep` finds, as (code, path).
async fn findings(scene: &Scene, code: i32) -> Result<Vec<(String, PathBuf)>> {
    let run = scene.run("check vm1 --deep --json").await?;
    let found = run.expect_code(code)?.json()?["findings"].as_array().context("findings")?.clone();
    let of = |finding: &Value| {
        Some((finding["code"].as_str()?.to_owned(), PathBuf::from(finding["path"].as_str()?)))
    };
    found.iter().map(of).collect::<Option<_>>().context("a finding without a code or a path")
}

#[tokio::test]
async fn a_layer_that_was_written_to_is_found_and_named() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks())).await?;
    for name in ["a", "b"] {
        scene.run(&format!("create vm1 --name {name}")).await?.ok()?;
        scene.guest.wait_records(3).await?;
    }
    let whole = scene.run("check vm1 --deep").await?;
    assert_says(&whole.ok()?.stdout, &["2 disks", "whole"]);
    let content = |snapshot: &Value| snapshot["disks"][0]["fingerprint"]["content"].is_string();
    ensure!(scene.snapshots().await?.iter().all(content), "what was read is remembered");

    // Read before, with its old times: only its content can tell.
    let raw = layer(&scene, "a", "sb").await?;
    damage(&raw, 3 << 20, true)?;
    let said = scene.run("check vm1 --deep").await?;
    assert_says(&said.expect_code(DAMAGE)?.stdout, &["changed-layer", "snapshot a", "damaged"]);
    ensure!(findings(&scene, DAMAGE).await? == [("changed-layer".into(), raw.clone())], "once, and again");
    damage(&raw, 3 << 20, true)?;
    ensure!(findings(&scene, 0).await?.is_empty(), "as it was before");

    // A copy in its place holds the same.
    let copy = raw.with_extension("copy");
    fs::copy(&raw, &copy)?;
    Command::new("chattr").arg("-i").arg(&raw).output()?;
    fs::rename(&copy, &raw)?;
    let found = findings(&scene, 0).await?;
    ensure!(found.contains(&("touched-layer".into(), raw.clone())), "{found:?}");
    scene.guest.kill().await
}

#[tokio::test]
async fn a_layer_that_nobody_read_before_is_known_by_what_it_was_when_it_was_sealed() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks())).await?;
    for name in ["a", "b"] {
        scene.guest.wait_records(3).await?;
        scene.run(&format!("create vm1 --name {name}")).await?.ok()?;
    }
    let overlay = layer(&scene, "b", "va").await?;
    // The first entry of its refcount table: its clusters are counted by nobody then.
    let mut offset = [0; 8];
    File::open(&overlay)?.read_exact_at(&mut offset, 48)?;
    damage(&overlay, u64::from_be_bytes(offset) + 5, true)?;
    let found = findings(&scene, DAMAGE).await?;
    let codes: Vec<&str> = found.iter().map(|(code, _)| code.as_str()).collect();
    ensure!(codes.contains(&"corrupt-image") && codes.contains(&"changed-layer"), "{found:?}");
    ensure!(found.iter().all(|(_, path)| *path == overlay), "{found:?}");
    // What stands on it is not blamed, and the guest runs on.
    scene.guest.wait_records(3).await?;
    scene.guest.kill().await
}
