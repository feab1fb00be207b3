//! `snapctl delete` and `snapctl flatten` on real guests that write all the time, and what a crash leaves of them
//! (Q8, Q9, Q11, Q16).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tests::lab::{self, DiskSpec, Guest, Progress, Qemu};

use crate::support::{KILLED, Scene, assert_says, two_disks};

/// Most layers that `create` makes.
const LAYERS: usize = 96;

/// Every kind of disk that a layer can be merged on.
fn all_kinds() -> [DiskSpec; 5] {
    [
        DiskSpec::new("va").iothread(),
        DiskSpec::new("vb").raw(),
        DiskSpec::new("sc").scsi().drive(),
        DiskSpec::new("sd").scsi().raw().drive(),
        DiskSpec::new("ve").throttle(),
    ]
}

/// Snapshots with what the guest had synced before each.
#[derive(Default)]
struct Taken(BTreeMap<String, Progress>);

impl Taken {
    /// Takes snapshots one after the other, with writes of the guest between them.
    async fn take(&mut self, scene: &Scene, names: &[&str]) -> Result<()> {
        for name in names {
            let before = scene.guest.wait_records(3).await?;
            scene.run(&format!("create vm1 --name {name}")).await?.ok()?;
            self.0.insert((*name).to_owned(), before);
        }
        scene.guest.wait_records(3).await.map(drop)
    }

    /// Every snapshot that is there is whole.
    async fn assert_whole(&self, scene: &Scene) -> Result<()> {
        for snapshot in scene.snapshots().await? {
            let name = snapshot["name"].as_str().context("name")?;
            let before = self.0.get(name).with_context(|| format!("{name} was never taken"))?;
            scene.assert_whole(&snapshot, before).with_context(|| format!("snapshot {name}"))?;
        }
        Ok(())
    }
}

/// How many layers the chain of each disk has.
async fn chain_lengths(scene: &Scene) -> Result<Vec<usize>> {
    let tree = scene.run("tree vm1 --json").await?.ok()?.json()?;
    let disks = tree["disks"].as_array().context("disks")?;
    let chains = disks.iter().filter_map(|disk| disk["layers"].as_array());
    Ok(chains.map(Vec::len).filter(|length| *length > 0).collect())
}

async fn deleted_anywhere_on(qemu: Qemu) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(all_kinds()).cdrom().qemu(qemu)).await?;
    let mut taken = Taken::default();
    taken.take(&scene, &["a", "b", "c", "d", "e"]).await?;
    // Neighbours in the middle, the newest, the oldest with the first images, and the last one.
    for (going, left) in [("b c", "a d e"), ("e", "a d"), ("a", "d"), ("d", "")] {
        let deleted = scene.run(&format!("delete vm1 {going}")).await?;
        assert_says(&deleted.ok()?.stdout, &["deleted", "removed"]);
        ensure!(scene.names().await?.join(" ") == left, "after deleting {going}");
        scene.assert_sound().await.with_context(|| format!("after deleting {going}"))?;
        taken.assert_whole(&scene).await.with_context(|| format!("after deleting {going}"))?;
    }
    ensure!(scene.layers().await?.len() == all_kinds().len(), "one layer for each disk is left");
    taken.take(&scene, &["f"]).await?;
    scene.run("flatten vm1").await?.ok()?;
    taken.assert_whole(&scene).await.context("after flattening")?;
    let below: Vec<usize> = chain_lengths(&scene).await?;
    ensure!(below.iter().all(|length| *length == 1), "something is below: {below:?}");
    assert_says(&scene.run("flatten vm1").await?.ok()?.stdout, &["already so"]);
    scene.run("delete vm1 f").await?.ok()?;
    scene.assert_sound().await.context("after deleting what was flattened away from")?;
    scene.assert_nothing_lost().await
}

#[tokio::test]
async fn q9_snapshots_are_deleted_anywhere_in_the_chain() -> Result<()> {
    deleted_anywhere_on(Qemu::Distro).await
}

#[tokio::test]
async fn q9_snapshots_are_deleted_anywhere_in_the_chain_on_the_newer_qemu() -> Result<()> {
    deleted_anywhere_on(Qemu::Backports).await
}

#[tokio::test]
async fn snapshots_of_a_stopped_vm_are_deleted() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks())).await?;
    let mut taken = Taken::default();
    taken.take(&scene, &["a", "b", "c", "d"]).await?;
    let synced = scene.guest.progress()?;
    scene.guest.kill().await?;
    for (line, left) in
        [("delete vm1 b", "a c d"), ("delete vm1 d a", "c"), ("flatten vm1", "c"), ("delete vm1 c", "")]
    {
        scene.run(line).await?.ok()?;
        ensure!(scene.names().await?.join(" ") == left, "after {line}");
        scene.run("check vm1").await?.ok().with_context(|| format!("after {line}"))?;
        taken.assert_whole(&scene).await.with_context(|| format!("after {line}"))?;
    }
    ensure!(scene.images()?.len() == two_disks().len(), "{:?}", scene.images()?);
    // It starts from what is left, and goes on where it was.
    let mut scene = scene.start_again().await?;
    scene.assert_sound().await?;
    for disk in scene.guest.mounted() {
        let records = scene.guest.progress()?[disk.id()];
        ensure!(records > synced[disk.id()], "{}: {records} after {synced:?}", disk.id());
    }
    scene.assert_nothing_lost().await
}

/// What somebody else stands on stays as it is, and goes when nobody stands on it any more.
#[tokio::test]
async fn q11_a_layer_that_a_clone_stands_on_is_left_alone() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks())).await?;
    let mut taken = Taken::default();
    taken.take(&scene, &["a", "b"]).await?;
    let layer = scene.snapshot("b").await?.context("b")?["disks"][0]["path"].clone();
    let base = Path::new(layer.as_str().context("path")?);
    let clone = base.with_file_name("clone.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
    let made = Command::new("qemu-img").args(create).arg(base).arg(&clone).status()?;
    ensure!(made.success());
    let before = fs::read(&clone)?;

    let deleted = scene.run("delete vm1 b").await?;
    assert_says(&deleted.ok()?.stderr, &["clone.qcow2 stands or may stand on it", "stays for now"]);
    ensure!(base.exists() && fs::read(&clone)? == before);
    scene.run("check vm1").await?.ok()?;
    taken.assert_whole(&scene).await?;

    fs::remove_file(&clone)?;
    assert_says(&scene.run("recover vm1").await?.ok()?.stderr, &["1 layers of deleted snapshots"]);
    scene.assert_sound().await?;
    taken.assert_whole(&scene).await?;
    scene.assert_nothing_lost().await
}

/// Nothing is done to an image that a process has open: what QEMU has open, QEMU changes.
#[tokio::test]
async fn q12_an_image_in_use_is_not_touched() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks())).await?;
    let mut taken = Taken::default();
    taken.take(&scene, &["a", "b", "c"]).await?;
    // A running VM needs no tool beside its QEMU.
    scene.cli.run_with(["delete", "vm1", "b"], &[("PATH", "/nonexistent")]).await?.ok()?;
    scene.assert_sound().await?;
    scene.guest.kill().await?;
    let active = scene.active_layers().await?;
    let held = fs::File::open(&active["va"])?;
    let refused = scene.run("delete vm1 c").await?;
    let me = format!("process {} has", std::process::id());
    assert_says(&refused.expect_code(7)?.stderr, &[&me, "nothing was changed"]);
    ensure!(scene.names().await?.join(" ") == "a c");
    drop(held);
    scene.run("delete vm1 c").await?.ok()?;
    scene.run("check vm1").await?.ok()?;
    taken.assert_whole(&scene).await
}

/// How a deletion is begun, so that the merge is of one kind.
struct Case {
    qemu: Qemu,
    /// Snapshots that are taken before, and the command.
    take: &'static [&'static str],
    line: &'static str,
    /// The disk that gets more data first, so that the direction is known.
    heavy: Option<Heavy>,
}

/// What holds more data than the rest.
#[derive(Clone, Copy, PartialEq)]
enum Heavy {
    /// The layers that go away: what is above is copied down into them.
    Released,
    /// The layer above: the others are copied up into it.
    Above,
}

/// Takes the case's snapshots, with a file written so that one layer is the heavy one.
async fn set_up(scene: &Scene, case: &Case, taken: &mut Taken) -> Result<()> {
    for (at, name) in case.take.iter().enumerate() {
        // What is written before a snapshot is in the layer that it freezes.
        if at + 1 == case.take.len() && case.heavy == Some(Heavy::Released) {
            write_ballast(scene).await?;
        }
        taken.take(scene, &[name]).await?;
    }
    if case.heavy == Some(Heavy::Above) {
        write_ballast(scene).await?;
    }
    Ok(())
}

async fn write_ballast(scene: &Scene) -> Result<()> {
    for disk in scene.guest.mounted() {
        let id = disk.id();
        let (code, said) = scene
            .guest
            .shell(&format!("dd if=/dev/zero of=/data/{id}/ballast bs=1M count=8 2>&1 && sync"))
            .await?;
        ensure!(code == 0, "{id}: {said}");
    }
    Ok(())
}

/// The points that the command passes, in order, each once.
async fn points(scene: &Scene, line: &str) -> Result<Vec<String>> {
    let file = scene.cli.root().join("points");
    scene.run_faulty(line, &format!("list:{}", file.display())).await?.ok()?;
    let text = fs::read_to_string(&file)?;
    fs::remove_file(&file)?;
    let mut names: Vec<String> = Vec::new();
    for name in text.lines().map(str::to_owned) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(names)
}

/// Killed at every point, the snapshots are deleted or not, and nothing else is different.
async fn killed_everywhere(case: Case, expected: &str) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks()).qemu(case.qemu)).await?;
    let mut taken = Taken::default();
    set_up(&scene, &case, &mut taken).await?;
    let points = points(&scene, case.line).await?;
    let expected: Vec<String> = expected.split(' ').map(|name| format!("merge.{name}")).collect();
    // Disks do not wait for each other, so only which points there are is known.
    ensure!(points.iter().collect::<BTreeSet<_>>() == expected.iter().collect(), "the points are {points:?}");
    // Commands that only look settle too; `recover` merges the rest as well.
    for (point, next) in points.iter().zip(["list vm1", "recover vm1", "tree vm1"].into_iter().cycle()) {
        clear(&scene).await?;
        set_up(&scene, &case, &mut taken).await?;
        killed_at(&mut scene, case.line, point, next, &taken)
            .await
            .with_context(|| format!("{point} ({next})"))?;
    }
    scene.assert_nothing_lost().await
}

/// Deletes what there is.
async fn clear(scene: &Scene) -> Result<()> {
    let names = scene.names().await?;
    if !names.is_empty() {
        scene.run(&format!("delete vm1 {}", names.join(" "))).await?.ok()?;
    }
    Ok(())
}

async fn killed_at(scene: &mut Scene, line: &str, point: &str, next: &str, taken: &Taken) -> Result<()> {
    scene.run_faulty(line, &format!("{point}=kill")).await?.expect_code(KILLED)?;
    scene.run(next).await?.ok()?;
    scene.assert_thawed().await?;
    taken.assert_whole(scene).await?;
    let recovered = scene.run("recover vm1").await?;
    recovered.ok()?;
    scene.assert_sound().await?;
    taken.assert_whole(scene).await
}

const INNER_POINTS: &str = "deleted begun unsealed started ready flushed entered closed removed";
const ACTIVE_POINTS: &str =
    "deleted begun unsealed started ready paused switched flushed pivoted entered closed removed";

#[tokio::test]
async fn q16_killed_at_every_point_of_a_commit_of_inner_layers() -> Result<()> {
    let take = &["a", "b", "c"];
    let case = Case { qemu: Qemu::Distro, take, line: "delete vm1 b", heavy: None };
    killed_everywhere(case, INNER_POINTS).await
}

#[tokio::test]
async fn q16_killed_at_every_point_of_a_stream_into_the_active_layer() -> Result<()> {
    let take = &["a", "b"];
    let case = Case { qemu: Qemu::Backports, take, line: "delete vm1 b", heavy: Some(Heavy::Above) };
    killed_everywhere(case, INNER_POINTS).await
}

#[tokio::test]
async fn q10_q16_killed_at_every_point_of_a_commit_of_the_active_layer() -> Result<()> {
    let take = &["a", "b"];
    let case = Case { qemu: Qemu::Distro, take, line: "delete vm1 b", heavy: Some(Heavy::Released) };
    killed_everywhere(case, ACTIVE_POINTS).await
}

#[tokio::test]
async fn q16_killed_at_every_point_of_a_commit_of_the_active_layer_on_the_newer_qemu() -> Result<()> {
    let take = &["a", "b"];
    let case = Case { qemu: Qemu::Backports, take, line: "delete vm1 b", heavy: Some(Heavy::Released) };
    killed_everywhere(case, ACTIVE_POINTS).await
}

#[tokio::test]
async fn q16_killed_at_every_point_of_a_flattening() -> Result<()> {
    let take = &["a", "b"];
    let case = Case { qemu: Qemu::Distro, take, line: "flatten vm1", heavy: None };
    killed_everywhere(case, INNER_POINTS).await
}

/// QEMU dies while layers are merged, and the tool with it: the files and the journal tell what counts.
async fn qemu_killed_at(case: Case, points: &[&str]) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks()).qemu(case.qemu)).await?;
    let mut taken = Taken::default();
    for point in points {
        clear(&scene).await?;
        set_up(&scene, &case, &mut taken).await?;
        scene = qemu_dies(scene, case.line, &format!("merge.{point}"), &taken)
            .await
            .with_context(|| format!("at {point}"))?;
    }
    scene.assert_nothing_lost().await
}

async fn qemu_dies(mut scene: Scene, line: &str, point: &str, taken: &Taken) -> Result<Scene> {
    let stopped = scene.stop_at(line, point).await?;
    let synced = scene.guest.progress()?;
    scene.guest.kill().await?;
    stopped.kill().await?;
    scene.run("recover vm1").await?.ok()?;
    scene.assert_settled().await?;
    scene.run("check vm1").await?.ok()?;
    taken.assert_whole(&scene).await?;
    scene.assert_active_layers_hold(&synced).await?;
    let mut scene = scene.start_again().await?;
    scene.assert_sound().await?;
    Ok(scene)
}

#[tokio::test]
async fn q16_qemu_killed_in_a_commit_of_the_active_layer() -> Result<()> {
    let take = &["a", "b"];
    let case = Case { qemu: Qemu::Distro, take, line: "delete vm1 b", heavy: Some(Heavy::Released) };
    qemu_killed_at(case, &["begun", "started", "paused", "switched", "pivoted", "entered", "closed"]).await
}

#[tokio::test]
async fn q16_qemu_killed_in_a_stream() -> Result<()> {
    let take = &["a", "b"];
    let case = Case { qemu: Qemu::Backports, take, line: "delete vm1 b", heavy: Some(Heavy::Above) };
    qemu_killed_at(case, &["unsealed", "started", "ready", "flushed", "entered"]).await
}

#[tokio::test]
async fn q16_qemu_killed_in_a_commit_of_inner_layers() -> Result<()> {
    let take = &["a", "b", "c"];
    let case = Case { qemu: Qemu::Distro, take, line: "delete vm1 b", heavy: None };
    qemu_killed_at(case, &["started", "ready", "flushed", "closed"]).await
}

/// The same merges with nothing open in a VM, by the storage daemon.
#[tokio::test]
async fn q16_killed_at_every_point_on_a_stopped_vm() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disks(two_disks())).await?;
    let mut taken = Taken::default();
    let names: Vec<String> = (0..14).map(|n| format!("s{n:02}")).collect();
    taken.take(&scene, &names.iter().map(String::as_str).collect::<Vec<_>>()).await?;
    let synced = scene.guest.progress()?;
    scene.guest.kill().await?;
    let points = "deleted begun unsealed started ready switched flushed pivoted entered closed removed";
    // From the newest, whose layer is below the active one, down.
    for (point, name) in points.split(' ').zip(names.iter().rev()) {
        let line = format!("delete vm1 {name}");
        let run = scene.run_faulty(&line, &format!("merge.{point}=kill")).await?;
        // Which points there are depends on the direction.
        ensure!(run.code == KILLED || (run.code == 0 && ["switched", "pivoted"].contains(&point)), "{run:?}");
        let recovered = scene.run("recover vm1").await?;
        recovered.ok().with_context(|| format!("at {point}"))?;
        scene.run("check vm1").await?.ok()?;
        taken.assert_whole(&scene).await.with_context(|| format!("at {point}"))?;
        scene.assert_active_layers_hold(&synced).await.with_context(|| format!("at {point}"))?;
    }
    Ok(())
}

/// As many layers as a chain may have: one can still look at the VM, and merge them.
#[tokio::test]
async fn a_chain_of_as_many_layers_as_are_allowed() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(Guest::spec().disk(DiskSpec::new("va"))).await?;
    let mut taken = Taken::default();
    taken.take(&scene, &["first"]).await?;
    for n in 1..LAYERS - 1 {
        scene.run(&format!("create vm1 --name s{n}")).await?.ok()?;
    }
    ensure!(chain_lengths(&scene).await? == [LAYERS]);
    let refused = scene.run("create vm1 --name more").await?;
    assert_says(
        &refused.expect_code(7)?.stderr,
        &["96 layers already", "delete or merge older snapshots first"],
    );

    let middle: Vec<String> = (20..80).map(|n| format!("s{n}")).collect();
    scene.run(&format!("delete vm1 {}", middle.join(" "))).await?.ok()?;
    ensure!(chain_lengths(&scene).await? == [LAYERS - middle.len()]);
    let prune = scene.run("prune vm1 --keep-last 1").await?;
    assert_says(&prune.ok()?.stdout, &["1 kept"]);
    scene.assert_sound().await?;
    scene.assert_nothing_lost().await
}
