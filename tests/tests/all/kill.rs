//! What a crash leaves: `snapctl create` ended at every point where it can be, and what the next command
//! makes of it (G1, Q2, Q3, Q4, Q5).

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use tests::lab::{self, Disk, Format, Guest, Progress, Qemu};

use crate::support::{KILLED, Scene, Stopped, assert_says, send, two_disks, wait_until};

/// The first point at which the snapshot is taken.
const SWITCHED: &str = "create.switched";
/// The first point after the snapshot is in the catalogue.
const RECORDED: &str = "create.recorded";
/// Points at which QEMU has the overlays open and no disk uses them.
const OPEN: [&str; 5] =
    ["create.opened", "create.prepared", "create.synced", "create.guarded", "create.frozen"];
/// How many instants of a run are tried.
const INSTANTS: u32 = 24;
/// Longer than by what `snapctl check` lets clocks differ.
const STEP_OF_CLOCKS: Duration = Duration::from_secs(3);

/// A point of `create`, and whether the snapshot is taken when it is reached.
struct Point {
    name: String,
    taken: bool,
}

impl Point {
    fn new(name: &str, taken: bool) -> Self {
        Self { name: name.to_owned(), taken }
    }
}

async fn scene(qemu: Qemu) -> Result<Option<Scene>> {
    if !lab::available()? {
        return Ok(None);
    }
    Scene::boot(Guest::spec().disks(two_disks()).qemu(qemu)).await.map(Some)
}

/// The points that `snapctl create` passes, in order.
async fn points(scene: &Scene, quiesce: &str) -> Result<Vec<Point>> {
    let file = scene.cli.root().join("points");
    let fault = format!("list:{}", file.display());
    scene.run_faulty(&format!("create vm1 --name listed{} {quiesce}", quiesce.len()), &fault).await?.ok()?;
    let text = std::fs::read_to_string(&file)?;
    std::fs::remove_file(&file)?;
    let names: Vec<&str> = text.lines().collect();
    let switched = names.iter().position(|name| *name == SWITCHED).context("nothing was switched")?;
    Ok(names.iter().enumerate().map(|(at, name)| Point::new(name, at >= switched)).collect())
}

/// Kills `create` at `point`, lets another command find it, and looks whether all is well.
async fn killed_at(scene: &mut Scene, point: &Point, quiesce: &str, next: &str) -> Result<()> {
    let before = scene.guest.progress()?;
    let name = format!("k-{}{}", point.name, quiesce);
    let (line, fault) = (format!("create vm1 --name {name} {quiesce}"), format!("{}=kill", point.name));
    scene.run_faulty(&line, &fault).await?.expect_code(KILLED)?;
    let (open, leaked) = (OPEN.contains(&point.name.as_str()), scene.unused_nodes().await?);
    ensure!(open != leaked.is_empty(), "before the next command: {leaked:?}");
    let next = next.replace("NEW", &format!("n-{}{}", point.name, quiesce));
    let found = scene.run(&next).await?;
    found.ok()?;
    let what = if point.taken { "is finished now" } else { "is undone now" };
    if point.name != RECORDED {
        assert_says(&found.stderr, &[&name, "was interrupted", what]);
    }
    scene.assert_sound().await?;
    settled_as(scene, point.taken, &name, &before).await
}

/// The snapshot either fully is, or is not.
async fn settled_as(scene: &Scene, taken: bool, name: &str, before: &Progress) -> Result<()> {
    let snapshot = scene.snapshot(name).await?;
    ensure!(snapshot.is_some() == taken, "taken {taken}: {snapshot:?}");
    snapshot.map_or(Ok(()), |snapshot| scene.assert_whole(&snapshot, before))
}

/// Returns the names of the points.
async fn killed_everywhere(scene: &mut Scene, quiesce: &str) -> Result<Vec<String>> {
    let next =
        ["recover vm1", "list vm1", "create vm1 --name NEW", "create vm1 --quiesce --name NEW", "tree vm1"];
    let points = points(scene, quiesce).await?;
    scene.assert_sound().await?;
    for (point, next) in points.iter().zip(next.iter().cycle()) {
        killed_at(scene, point, quiesce, next)
            .await
            .with_context(|| format!("at {} ({next})", point.name))?;
    }
    Ok(points.into_iter().map(|point| point.name).collect())
}

#[tokio::test]
async fn g1_q3_q4_killed_at_every_point_of_a_quiesced_snapshot() -> Result<()> {
    let Some(mut scene) = scene(Qemu::Distro).await? else { return Ok(()) };
    let names = killed_everywhere(&mut scene, "--quiesce").await?;
    let expected =
        "begun files opened prepared synced guarded frozen switched thawed verified sealed recorded";
    let expected: Vec<String> = expected.split(' ').map(|name| format!("create.{name}")).collect();
    assert_eq!(names, expected);
    Ok(())
}

#[tokio::test]
async fn q3_q4_killed_at_every_point_of_a_plain_snapshot() -> Result<()> {
    let Some(mut scene) = scene(Qemu::Distro).await? else { return Ok(()) };
    let names = killed_everywhere(&mut scene, "").await?;
    assert!(!names.iter().any(|name| name == "create.frozen"), "{names:?}");
    Ok(())
}

#[tokio::test]
async fn g1_killed_at_the_points_that_matter_most_on_the_newer_qemu() -> Result<()> {
    let Some(mut scene) = scene(Qemu::Backports).await? else { return Ok(()) };
    for (name, taken) in [("opened", false), ("frozen", false), ("switched", true), ("verified", true)] {
        let point = Point::new(&format!("create.{name}"), taken);
        killed_at(&mut scene, &point, "--quiesce", "recover vm1")
            .await
            .with_context(|| point.name.clone())?;
    }
    Ok(())
}

/// Between the points, too: killed at instants that are spread over a whole run, on a warm VM.
#[tokio::test]
async fn g1_q2_killed_at_any_instant() -> Result<()> {
    let Some(mut scene) = scene(Qemu::Distro).await? else { return Ok(()) };
    let whole = scene.run("create vm1 --quiesce --name whole").await?.ok()?.took;
    for at in 0..INSTANTS {
        let (name, before) = (format!("at{at}"), scene.guest.progress()?);
        let mut child = scene.cli.spawn(["create", "vm1", "--quiesce", "--name", &name], &[])?;
        tokio::time::sleep(whole * at / INSTANTS).await;
        child.start_kill()?;
        child.wait().await?;
        scene.run("recover vm1").await?.ok()?;
        scene.assert_sound().await.with_context(|| format!("killed after {at}/{INSTANTS} of {whole:?}"))?;
        if let Some(snapshot) = scene.snapshot(&name).await? {
            scene.assert_whole(&snapshot, &before)?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_step_that_fails_is_undone_or_left_to_recover() -> Result<()> {
    let Some(mut scene) = scene(Qemu::Distro).await? else { return Ok(()) };
    for quiesce in ["--quiesce", ""] {
        for point in points(&scene, quiesce).await? {
            failed_at(&mut scene, &point, quiesce).await.with_context(|| point.name.clone())?;
        }
    }
    Ok(())
}

async fn failed_at(scene: &mut Scene, point: &Point, quiesce: &str) -> Result<()> {
    let before = scene.guest.progress()?;
    let name = format!("e-{}{quiesce}", point.name);
    let (line, fault) = (format!("create vm1 --name {name} {quiesce}"), format!("{}=error", point.name));
    let run = scene.run_faulty(&line, &fault).await?;
    if !point.taken {
        run.expect_code(1)?;
        assert_says(&run.stderr, &["failed", &point.name, "everything was undone"]);
    } else {
        run.expect_code(8)?;
        assert_says(&run.stderr, &["snapctl recover vm1"]);
        scene.assert_thawed().await?;
        let recovered = scene.run("recover vm1").await?;
        recovered.ok()?;
        ensure!((point.name == RECORDED) == recovered.stderr.is_empty(), "{recovered:?}");
    }
    scene.assert_sound().await?;
    settled_as(scene, point.taken, &name, &before).await
}

#[tokio::test]
async fn a_signal_undoes_before_the_point_and_waits_after_it() -> Result<()> {
    let Some(mut scene) = scene(Qemu::Distro).await? else { return Ok(()) };
    let signals = [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)];
    for quiesce in ["--quiesce", ""] {
        for (point, (signal, code)) in points(&scene, quiesce).await?.iter().zip(signals.iter().cycle()) {
            let signalled = signalled_at(&mut scene, point, quiesce, *signal, *code);
            signalled.await.with_context(|| format!("{signal:?} at {}", point.name))?;
        }
    }
    Ok(())
}

async fn signalled_at(
    scene: &mut Scene,
    point: &Point,
    quiesce: &str,
    signal: Signal,
    code: i32,
) -> Result<()> {
    let before = scene.guest.progress()?;
    let name = format!("s-{}{quiesce}", point.name);
    let stopped = scene.stop_at(&format!("create vm1 --name {name} {quiesce}"), &point.name).await?;
    stopped.signal(signal)?;
    let ended = stopped.go_on().await?;
    if point.taken {
        assert_says(&ended.expect_code(0)?.stdout, &["snapshot", &name]);
    } else {
        ended.expect_code(code)?;
        assert_says(&ended.stderr, &["interrupted by SIG", "everything was undone"]);
    }
    scene.assert_sound().await?;
    settled_as(scene, point.taken, &name, &before).await
}

/// Both the tool and its guard die in the freeze window, so nobody thaws until the next command.
#[tokio::test]
async fn g1_when_the_guard_dies_too_the_next_command_thaws() -> Result<()> {
    let Some(mut scene) = scene(Qemu::Distro).await? else { return Ok(()) };
    for (point, taken, next) in
        [("create.frozen", false, "list vm1"), (SWITCHED, true, "create vm1 --quiesce --name after")]
    {
        let before = scene.guest.progress()?;
        let stopped = scene.stop_at(&format!("create vm1 --quiesce --name {point}"), point).await?;
        end_with_guard(&scene, stopped).await?;
        let frozen = scene.guest.progress()?;
        ensure!(scene.run(next).await?.ok()?.stderr.contains("was interrupted"), "{next} recovered nothing");
        scene.assert_sound().await.with_context(|| format!("frozen at {frozen:?}"))?;
        settled_as(&scene, taken, point, &before).await?;
    }
    Ok(())
}

async fn end_with_guard(scene: &Scene, stopped: Stopped) -> Result<()> {
    let guards = scene.guards();
    ensure!(guards.len() == 1, "guards: {guards:?}");
    send(guards[0], Signal::KILL)?;
    stopped.kill().await?;
    wait_until("the guard is gone", || scene.guards().is_empty()).await
}

/// QEMU dies while a snapshot is being taken: recovery has only the files to go by.
#[tokio::test]
async fn q5_qemu_killed_before_and_after_the_point() -> Result<()> {
    let Some(mut scene) = scene(Qemu::Distro).await? else { return Ok(()) };
    // (point, quiesced, whether the guest writes between the point and the end of QEMU, taken)
    let cases = [
        ("create.files", "", false, false),
        ("create.prepared", "--quiesce", false, false),
        ("create.frozen", "--quiesce", false, false),
        (SWITCHED, "", true, true),
        // Nothing was written since, so there is nothing that the overlays alone would hold.
        (SWITCHED, "--quiesce", false, false),
        ("create.thawed", "--quiesce", true, true),
        ("create.verified", "--quiesce", true, true),
        ("create.sealed", "", true, true),
    ];
    for (at, (point, quiesce, writes, taken)) in cases.into_iter().enumerate() {
        let name = format!("q{at}");
        scene = qemu_killed_at(scene, &name, (point, quiesce), writes, taken)
            .await
            .with_context(|| format!("{point} {quiesce}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn q5_a_vm_started_on_its_old_layers_before_recovery_keeps_what_it_wrote_since() -> Result<()> {
    let Some(mut scene) = scene(Qemu::Distro).await? else { return Ok(()) };
    let stopped = scene.stop_at("create vm1 --name one", SWITCHED).await?;
    scene.guest.wait_records(5).await?;
    scene.guest.kill().await?;
    ensure!(stopped.go_on().await?.code == 8);

    let old: Vec<_> = scene.guest.disks().iter().map(|disk| (disk.path.clone(), disk.spec.format)).collect();
    let overlays = overlays(&scene)?;
    let Scene { guest, cli, .. } = scene;
    let guest =
        guest.boot_again(|disk| if disk.id() == "va" { old[0].clone() } else { old[1].clone() }).await?;
    let qmp = guest.lab_qmp().await?;
    let mut scene = Scene { guest, cli, qmp };
    let refused = scene.run("recover vm1").await?;
    refused.expect_code(8)?;
    assert_says(&refused.stderr, &["started on its old layers", "snapctl disk path"]);
    // A command that only looks still does, and nothing is thrown away.
    scene.run("list vm1").await?.ok()?;
    ensure!(overlays == self::overlays(&scene)?, "the overlays changed");

    scene.guest.kill().await?;
    scene.run("recover vm1").await?.ok()?;
    ensure!(scene.snapshots().await?.len() == 1);
    // The old layers were written to after the point, and that is said.
    let check = scene.run("check vm1").await?;
    check.expect_code(13)?;
    assert_says(&check.stdout, &["base-newer"]);
    Ok(())
}

#[tokio::test]
async fn what_qemu_does_not_close_is_not_removed() -> Result<()> {
    let Some(mut scene) = scene(Qemu::Distro).await? else { return Ok(()) };
    // Something of somebody else stands on one of the overlays.
    let hold = |nodes: Vec<String>| {
        let overlay = nodes.into_iter().find(|node| !node.ends_with('f')).context("no overlay")?;
        let node = json!({"driver": "copy-on-read", "node-name": "holder", "file": overlay});
        anyhow::Ok(node)
    };

    scene.run_faulty("create vm1 --name one", "create.prepared=kill").await?.expect_code(KILLED)?;
    let node = hold(scene.unused_nodes().await?)?;
    scene.qmp.call("blockdev-add", node).await?;
    let before = overlays(&scene)?;
    scene.run("recover vm1").await?.expect_code(8)?;
    ensure!(before == overlays(&scene)?, "recovery changed the overlays");
    scene.qmp.call("blockdev-del", json!({"node-name": "holder"})).await?;
    scene.run("recover vm1").await?.ok()?;
    scene.assert_sound().await?;

    // The same while the snapshot itself undoes.
    let stopped = scene.stop_at("create vm1 --name two", "create.prepared=error,create.opened").await?;
    // The snapshot holds QEMU's monitor, and the test has its own.
    let node = hold(scene.unused_nodes().await?)?;
    scene.qmp.call("blockdev-add", node).await?;
    let ended = stopped.go_on().await?;
    assert_says(&ended.stderr, &["partly undone", "in use"]);
    overlays(&scene)?;
    scene.qmp.call("blockdev-del", json!({"node-name": "holder"})).await?;
    scene.run("recover vm1").await?.ok()?;
    scene.assert_sound().await
}

#[tokio::test]
async fn a_base_that_was_written_to_until_the_point_is_not_newer_than_it() -> Result<()> {
    let Some(mut scene) = scene(Qemu::Distro).await? else { return Ok(()) };
    let before = scene.guest.progress()?;
    let started = SystemTime::now();
    let stopped = scene.stop_at("create vm1 --name one", "create.switched=kill,create.opened").await?;
    let bases: Vec<PathBuf> = scene.guest.disks().iter().map(|disk| disk.path.clone()).collect();
    let is_late = |base: &PathBuf| {
        let written = base.metadata().and_then(|metadata| metadata.modified());
        written.is_ok_and(|written| written > started + STEP_OF_CLOCKS)
    };
    wait_until("the guest writes to its disks", || bases.iter().all(is_late)).await?;
    stopped.go_on().await?.expect_code(KILLED)?;
    scene.run("recover vm1").await?.ok()?;
    scene.assert_sound().await?;
    settled_as(&scene, true, "one", &before).await
}

/// A disk that is unplugged between the point and its recovery does not keep the others from theirs.
#[tokio::test]
async fn the_rest_is_finished_when_a_disk_was_detached() -> Result<()> {
    let Some(mut scene) = scene(Qemu::Distro).await? else { return Ok(()) };
    let image = scene.guest.disks()[0].path.with_file_name("third.raw");
    std::fs::File::create(&image)?.set_len(16 << 20)?;
    let node = json!({"driver": "raw", "node-name": "third-raw",
        "file": {"driver": "file", "filename": image, "node-name": "third-file"}});
    scene.qmp.call("blockdev-add", node).await?;
    let device = json!({"driver": "virtio-blk-pci", "id": "third", "drive": "third-raw", "bus": "rp0"});
    scene.qmp.call("device_add", device).await?;
    scene.run_faulty("create vm1 --name one", "create.switched=kill").await?.expect_code(KILLED)?;
    scene.qmp.call("device_del", json!({"id": "third"})).await?;
    scene.qmp.event("DEVICE_DELETED", Duration::from_secs(60)).await?;
    assert_says(&scene.run("recover vm1").await?.ok()?.stderr, &["one", "is finished now"]);
    scene.assert_settled().await?;
    let snapshot = scene.snapshot("one").await?.context("no snapshot")?;
    ensure!(snapshot["disks"].as_array().is_some_and(|disks| disks.len() == 3), "{snapshot}");
    Ok(())
}

/// The overlays beside the disks' own images, with their content.
fn overlays(scene: &Scene) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let own: Vec<&Path> = scene.guest.disks().iter().map(|disk| disk.path.as_path()).collect();
    let dir = own[0].parent().context("an image without a directory")?;
    let paths = std::fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let mut found = Vec::new();
    for path in paths.into_iter().filter(|path| !own.contains(&path.as_path()) && path.is_file()) {
        let content = std::fs::read(&path)?;
        found.push((path, content));
    }
    found.sort();
    ensure!(found.len() == own.len(), "{} overlays", found.len());
    Ok(found)
}

async fn qemu_killed_at(
    mut scene: Scene,
    name: &str,
    (point, quiesce): (&str, &str),
    writes: bool,
    taken: bool,
) -> Result<Scene> {
    let before = scene.guest.progress()?;
    let stopped = scene.stop_at(&format!("create vm1 --name {name} {quiesce}"), point).await?;
    let synced = if writes { scene.guest.wait_records(5).await? } else { scene.guest.progress()? };
    scene.guest.kill().await?;
    let ended = stopped.go_on().await?;
    // Once every disk was seen on its overlay, the rest is done without QEMU.
    let seen = ["create.verified", "create.sealed"].contains(&point);
    ensure!(ended.code == if seen { 0 } else { 8 }, "{ended:?}");

    let found = scene.run("recover vm1").await?;
    found.ok()?;
    scene.assert_settled().await?;
    settled_as(&scene, taken, name, &before).await?;
    let active = active_images(&scene).await?;
    for (disk, (image, format)) in scene.guest.mounted().zip(&active) {
        let records = lab::read_records(image, format.driver())?;
        let synced = synced[disk.id()];
        ensure!(records.len() as u64 >= synced, "{}: {} of {synced}", disk.id(), records.len());
    }
    again(scene, &active).await
}

/// Boots on `images`, in the order of the guest's disks, and looks whether all is well.
async fn again(scene: Scene, images: &[(PathBuf, Format)]) -> Result<Scene> {
    let Scene { guest, cli, .. } = scene;
    let position = |disk: &Disk| if disk.id() == "va" { 0 } else { 1 };
    let guest = guest.boot_again(|disk| images[position(disk)].clone()).await?;
    let qmp = guest.lab_qmp().await?;
    let mut scene = Scene { guest, cli, qmp };
    scene.assert_sound().await?;
    Ok(scene)
}

/// What the next start of the VM has to use: what `snapctl disk path` says, or the disks' own images while
/// there is no snapshot.
async fn active_images(scene: &Scene) -> Result<Vec<(PathBuf, Format)>> {
    if scene.snapshots().await?.is_empty() {
        return Ok(scene.guest.disks().iter().map(|disk| (disk.path.clone(), disk.spec.format)).collect());
    }
    let format =
        |path: &Path| if path.extension().is_some_and(|e| e == "raw") { Format::Raw } else { Format::Qcow2 };
    let active = scene.active_layers().await?;
    let ids = scene.guest.disks().iter().map(Disk::id);
    Ok(ids.map(|id| (active[id].clone(), format(&active[id]))).collect())
}

/// All who could thaw are dead: the tool, its guard, and the agent in the frozen guest. That is remembered, told, and
/// made good as soon as an agent answers again.
#[tokio::test]
async fn g3_a_frozen_guest_whose_agent_died_is_remembered() -> Result<()> {
    let Some(mut scene) = scene(Qemu::Distro).await? else { return Ok(()) };
    let stopped = scene.stop_at("create vm1 --quiesce --name one", "create.frozen").await?;
    end_with_guard(&scene, stopped).await?;
    let (code, said) = scene.guest.shell("killall -9 qemu-ga; rm -f /run/qga.pid").await?;
    ensure!(code == 0, "{said}");
    // Twice: what is remembered stays so until it is made good.
    for _ in 0..2 {
        let recovered = scene.run("recover vm1").await?;
        recovered.expect_code(5)?;
        assert_says(&recovered.stderr, &["vm1 may be frozen", "cannot be thawed"]);
    }
    // It keeps nobody from other work, and says so each time.
    let plain = scene.run("create vm1 --name two").await?;
    assert_says(&plain.ok()?.stderr, &["vm1 may be frozen"]);

    let agent =
        "qemu-ga -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -t /run -f /run/qga.pid";
    scene.guest.shell(&format!("{agent} >/dev/null 2>&1 & sleep 0.2")).await?;
    scene.guest.wait_agent().await?;
    let recovered = scene.run("recover vm1").await?;
    assert_says(&recovered.ok()?.stderr, &["may have been frozen, and is not now"]);
    scene.assert_sound().await
}

/// A QEMU that was started since has a guest that nobody froze.
#[tokio::test]
async fn g3_a_guest_that_may_be_frozen_is_forgotten_with_its_qemu() -> Result<()> {
    let Some(mut scene) = scene(Qemu::Distro).await? else { return Ok(()) };
    let stopped = scene.stop_at("create vm1 --quiesce --name one", "create.frozen").await?;
    end_with_guard(&scene, stopped).await?;
    scene.guest.shell("killall -9 qemu-ga").await?;
    scene.run("recover vm1").await?.expect_code(5)?;
    scene.guest.kill().await?;
    let recovered = scene.run("recover vm1").await?;
    assert_says(&recovered.ok()?.stderr, &["is not now"]);
    scene.assert_settled().await
}
