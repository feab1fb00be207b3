//! Snapshots beside the active layers: reflink on XFS with real guests, thin volumes in the host VM.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::lab::{self, Cli, DiskSpec, Guest, GuestSpec, HostVm, Qemu, RawQmp, is_inside, run_test};

use crate::support::{KILLED, Scene, assert_says};

/// Small, and with room for copies that are written to.
const XFS_MIB: u64 = 640;

fn spec(qemu: Qemu) -> GuestSpec {
    Guest::spec()
        .disks([DiskSpec::new("va"), DiskSpec::new("sb").raw().scsi().drive()])
        .on_xfs(XFS_MIB)
        .qemu(qemu)
}

/// Whether guests can be had here, on an XFS.
fn available() -> Result<bool> {
    if !lab::can_mount_xfs() {
        ensure!(std::env::var_os("CI").is_none(), "CI demands XFS");
        eprintln!("SKIPPED: XFS cannot be mounted here");
        return Ok(false);
    }
    lab::available()
}

fn copies(snapshot: &Value) -> Result<Vec<PathBuf>> {
    let disks = snapshot["disks"].as_array().context("disks")?;
    Ok(disks.iter().filter_map(|disk| Some(disk["path"].as_str()?.into())).collect())
}

async fn j1_on(qemu: Qemu) -> Result<()> {
    if !available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(spec(qemu)).await?;
    // What a user gets who does not think about it.
    let before = scene.guest.progress()?;
    let created = scene.run("create vm1 --quiesce --name a").await?;
    assert_says(
        &created.ok()?.stdout,
        &["snapshot a", "2 disks", "filesystem-consistent", "copied by reflink"],
    );
    let first = scene.snapshot("a").await?.context("a")?;
    scene.assert_whole(&first, &before)?;
    for disk in first["disks"].as_array().context("disks")? {
        ensure!(disk["copied"] == "reflink" && disk["overlay"] != disk["path"], "{disk}");
    }
    // No chain grows, and the active path stays.
    scene.guest.wait_records(20).await?;
    let before = scene.guest.progress()?;
    scene.run("create vm1 --name b --method reflink").await?.ok()?;
    let second = scene.snapshot("b").await?.context("b")?;
    scene.assert_whole(&second, &before)?;
    let active = scene.active_layers().await?;
    for disk in scene.guest.disks() {
        ensure!(active[disk.id()] == disk.path, "{}: {active:?}", disk.id());
    }
    for layer in scene.layers().await?.iter().filter(|layer| layer.active) {
        ensure!(!layer.sealed, "the guest writes to it");
    }
    scene.assert_sound().await?;
    // They go away as files do, in any order.
    let gone = copies(&first)?;
    scene.run("delete vm1 a").await?.ok()?;
    ensure!(gone.iter().all(|path| !path.exists()), "{gone:?}");
    scene.assert_sound().await?;
    scene.assert_whole(&second, &before)?;
    scene.run("create vm1 --name c").await?.ok()?;
    let pruned = scene.run("prune vm1 --keep-last 1").await?;
    pruned.ok()?;
    ensure!(scene.names().await? == ["c"]);
    scene.assert_sound().await?;
    scene.assert_nothing_lost().await
}

#[tokio::test]
async fn j1_points_are_copies_that_share_their_data() -> Result<()> {
    j1_on(Qemu::Distro).await
}

#[tokio::test]
async fn j1_points_are_copies_that_share_their_data_on_the_newer_qemu() -> Result<()> {
    j1_on(Qemu::Backports).await
}

async fn j2_on(qemu: Qemu) -> Result<()> {
    if !available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(spec(qemu)).await?;
    scene.run("create vm1 --name a").await?.ok()?;
    scene.guest.wait_records(20).await?;
    scene.run("create vm1 --name b").await?.ok()?;
    // Back on a running VM: what was there is a branch, and the disks stand alone again.
    let reverted = scene.run("revert vm1 a").await?;
    assert_says(&reverted.ok()?.stdout, &["went back to snapshot a"]);
    scene.back_up().await?;
    scene.assert_sound().await?;
    for path in scene.active_layers().await?.values() {
        ensure!(backing_of(path)?.is_none(), "{} stands on something", path.display());
    }
    let tree = scene.run("tree vm1").await?;
    assert_says(&tree.ok()?.stdout, &["a", "b"]);
    // And forth, throwing away.
    scene.run("create vm1 --name c").await?.ok()?;
    scene.run("revert vm1 b --discard").await?.ok()?;
    scene.back_up().await?;
    scene.assert_sound().await?;
    // An overlay on top of it, and back below.
    scene.run("create vm1 --name d --method overlay").await?.ok()?;
    scene.run("revert vm1 c").await?.ok()?;
    scene.back_up().await?;
    scene.assert_sound().await?;
    for name in scene.names().await? {
        scene.run(&format!("delete vm1 {name}")).await?.ok()?;
        scene.assert_sound().await?;
    }
    ensure!(scene.images()?.len() == 2, "{:?}", scene.images()?);
    scene.assert_nothing_lost().await
}

fn backing_of(path: &Path) -> Result<Option<String>> {
    if path.extension().is_some_and(|ending| ending == "raw") {
        return Ok(None);
    }
    let output =
        std::process::Command::new("qemu-img").args(["info", "-U", "--output=json"]).arg(path).output()?;
    let info: Value = serde_json::from_slice(&output.stdout)?;
    Ok(info["backing-filename"].as_str().map(str::to_owned))
}

#[tokio::test]
async fn j2_one_goes_back_and_forth_and_no_chain_grows() -> Result<()> {
    j2_on(Qemu::Distro).await
}

#[tokio::test]
async fn j2_one_goes_back_and_forth_and_no_chain_grows_on_the_newer_qemu() -> Result<()> {
    j2_on(Qemu::Backports).await
}

/// Killed behind each step, and failing there: the copy is there or is not, and the guest runs on, thawed.
#[tokio::test]
async fn j3_killed_at_each_step_a_point_is_there_or_is_not() -> Result<()> {
    if !available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(spec(Qemu::Distro)).await?;
    let points = [
        ("aside.begun", false),
        ("aside.prepared", false),
        ("create.guarded", false),
        ("create.frozen", false),
        ("aside.held", false),
        ("aside.made", false),
        ("create.switched", false),
        ("aside.copied", true),
        ("aside.sealed", true),
        ("aside.recorded", true),
    ];
    for (index, (point, there)) in points.into_iter().enumerate() {
        let name = format!("k{index}");
        let before = scene.guest.progress()?;
        let line = format!("create vm1 --quiesce --name {name}");
        let killed = scene.run_faulty(&line, &format!("{point}=kill")).await?;
        killed.expect_code(KILLED)?;
        scene.run("list vm1 --wait 30").await?.ok()?;
        scene.assert_thawed().await.with_context(|| format!("killed at {point}"))?;
        let snapshot = scene.snapshot(&name).await?;
        ensure!(snapshot.is_some() == there, "killed at {point}: {snapshot:?}");
        if let Some(snapshot) = snapshot {
            scene.assert_whole(&snapshot, &before)?;
            scene.run(&format!("delete vm1 {name}")).await?.ok()?;
        }
        scene.assert_sound().await.with_context(|| format!("killed at {point}"))?;
        if !there {
            let failed = scene.run_faulty(&line, &format!("{point}=fail")).await?;
            ensure!([1, 4].contains(&failed.code), "failing at {point}: {failed:#?}");
            scene.assert_sound().await.with_context(|| format!("failed at {point}"))?;
        }
    }
    scene.assert_nothing_lost().await
}

/// A revert to a copy, killed behind each step.
#[tokio::test]
async fn j4_a_revert_to_a_copy_survives_a_kill_at_each_step() -> Result<()> {
    if !available()? {
        return Ok(());
    }
    let mut scene = Scene::boot(spec(Qemu::Distro)).await?;
    scene.run("create vm1 --name a").await?.ok()?;
    for point in [
        "revert.files",
        "revert.prepared",
        "revert.paused",
        "revert.pivoted",
        "revert.entered",
        "revert.closed",
    ] {
        scene.guest.wait_records(3).await?;
        let killed = scene.run_faulty("revert vm1 a", &format!("{point}=kill")).await?;
        killed.expect_code(KILLED)?;
        scene.run("recover vm1 --wait 30").await?.ok()?;
        scene.back_up().await.with_context(|| format!("killed at {point}"))?;
        scene.assert_sound().await.with_context(|| format!("killed at {point}"))?;
    }
    scene.guest.kill().await
}

/// A file system that cannot: overlays by themselves, and a reason where copies are asked for.
#[tokio::test]
async fn j5_a_file_system_that_cannot_share_extents_says_so() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let small = crate::support::Tmpfs::mount("size=160m")?;
    let Some(small) = small else { return Ok(()) };
    let image = small.path().join("small.raw");
    std::fs::File::create(&image)?.set_len(64 << 20)?;
    let disk = DiskSpec::new("sm").raw().blank().image(&image);
    let mut scene = Scene::boot(Guest::spec().disks(crate::support::two_disks()).disk(disk)).await?;
    let refused = scene.run("create vm1 --method reflink --disk sm").await?;
    assert_says(
        &refused.expect_code(7)?.stderr,
        &["disk sm cannot be copied by reflink", "cannot share extents"],
    );
    let refused = scene.run("create vm1 --method thin --disk sm").await?;
    assert_says(&refused.expect_code(7)?.stderr, &["disk sm cannot be copied by thin"]);
    let refused = scene.run("create vm1 --method reflink --memory").await?;
    refused.expect_code(2)?;
    let created = scene.run("create vm1 --disk sm").await?;
    ensure!(!created.ok()?.stdout.contains("copied by"), "{created:?}");
    scene.assert_sound().await?;
    scene.guest.kill().await
}

/// A QEMU whose processors never start, with logical volumes as its disks.
struct Held {
    qemu: std::process::Child,
    qmp: RawQmp,
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Held {
    async fn start(dir: &Path, disks: &[(&str, String)]) -> Result<Self> {
        let socket = |name: &str| dir.join(name);
        let mut qemu = std::process::Command::new("qemu-system-x86_64");
        qemu.args(["-S", "-M", "q35", "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none"]);
        for name in ["qmp", "lab"] {
            let _ = std::fs::remove_file(socket(name));
            qemu.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket(name).display()));
        }
        for (id, path) in disks {
            let file =
                format!("{{\"driver\":\"host_device\",\"node-name\":\"f-{id}\",\"filename\":\"{path}\"}}");
            let raw = format!("{{\"driver\":\"raw\",\"node-name\":\"n-{id}\",\"file\":\"f-{id}\"}}");
            qemu.args(["-blockdev", &file, "-blockdev", &raw]);
            qemu.args(["-device", &format!("virtio-blk-pci,drive=n-{id},id={id}")]);
        }
        let qemu = qemu.spawn()?;
        for _ in 0..600 {
            if let Ok(qmp) = RawQmp::connect(&socket("lab")).await {
                return Ok(Self { qemu, qmp });
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        anyhow::bail!("QEMU does not come up")
    }

    /// Lets QEMU do something to a disk as its guest would.
    async fn io(&mut self, disk: &str, command: &str) -> Result<()> {
        let line = format!("qemu-io -d /machine/peripheral/{disk}/virtio-backend \"{command}\"");
        let said = self.qmp.call("human-monitor-command", serde_json::json!({"command-line": line})).await?;
        ensure!(said == "", "{command}: {said}");
        Ok(())
    }
}

async fn run(cli: &Cli, line: &str) -> Result<lab::Run> {
    cli.run(line.split_whitespace()).await
}

fn sh(line: &str) -> Result<String> {
    let output = std::process::Command::new("sh").args(["-ec", line]).output()?;
    ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The byte of which the MiB at `mib` of a device is full.
fn byte_at(path: &Path, mib: u64) -> Result<u8> {
    use std::os::unix::fs::FileExt;

    let mut bytes = vec![0; 1 << 20];
    std::fs::File::open(path)?.read_exact_at(&mut bytes, mib << 20)?;
    ensure!(bytes.iter().all(|byte| *byte == bytes[0]), "{} is mixed at {mib} MiB", path.display());
    Ok(bytes[0])
}

#[tokio::test]
async fn j6_thin_volumes_have_points_beside_them() -> Result<()> {
    if !is_inside() {
        let vm = HostVm::default().disk(512).modules(&["dm-thin-pool"]);
        return run_test(&vm, "aside::j6_thin_volumes_have_points_beside_them").await;
    }
    sh(
        "pvcreate -q /dev/vda; vgcreate -q vg0 /dev/vda; lvcreate -q -L 256M -T vg0/pool0 --poolmetadatasize 4M -c 64k",
    )?;
    let cli = Cli::new()?;
    run(&cli, "pool define t1 lvm-thin --vg vg0 --thin-pool pool0").await?.ok()?;
    for volume in ["v1", "v2"] {
        run(&cli, &format!("volume create t1 {volume} 32M")).await?.ok()?;
    }
    let dir = tempfile::tempdir()?;
    let disks = [("d1", "/dev/vg0/v1".to_owned()), ("d2", "/dev/vg0/v2".to_owned())];
    let mut vm = Held::start(dir.path(), &disks).await?;
    run(&cli, &format!("vm add vm1 --qmp {}", dir.path().join("qmp").display())).await?.ok()?;
    vm.io("d1", "write -P 1 0 8M").await?;
    vm.io("d2", "write -P 2 0 8M").await?;
    let created = run(&cli, "create vm1 --name a --method thin").await?;
    assert_says(&created.ok()?.stdout, &["snapshot a of 2 disks", "copied by thin"]);
    vm.io("d1", "write -P 3 4M 1M").await?;
    let created = run(&cli, "create vm1 --name b").await?;
    assert_says(&created.ok()?.stdout, &["copied by thin"]);
    let shown = run(&cli, "list vm1 --json").await?.ok()?.json()?;
    let snapshots = shown["snapshots"].as_array().context("snapshots")?.clone();
    let (first, second) = (copies(&snapshots[0])?, copies(&snapshots[1])?);
    ensure!((byte_at(&first[0], 4)?, byte_at(&second[0], 4)?, byte_at(&first[1], 4)?) == (1, 3, 2));
    // Nothing can write to them, and they are no volumes.
    let read_only = sh(&format!("blockdev --getro {}", first[0].display()))?;
    ensure!(read_only.trim() == "1", "a copy can be written to");
    ensure!(run(&cli, "volume list t1").await?.ok()?.stdout.lines().count() == 3);
    run(&cli, "check vm1 --deep").await?.ok()?;
    assert_says(&run(&cli, "tree vm1").await?.ok()?.stdout, &["a", "b"]);
    let refused = run(&cli, "volume delete t1 v1").await?;
    assert_says(&refused.expect_code(7)?.stderr, &["v1"]);

    // What changed between two points is told by the pool's metadata.
    let volume = |path: &Path| storage::thin::ThinVolume::of(path)?.context("a thin volume");
    let changes = volume(&second[0])?.changes_since(&volume(&first[0])?)?;
    let ranges: Vec<(u64, u64)> = changes.iter().map(|change| (change.offset, change.length)).collect();
    ensure!(ranges == [(4 << 20, 1 << 20)], "{ranges:?}");

    // Back: the disks go on in volumes of their own, and one can go forth again.
    run(&cli, "revert vm1 a").await?.ok()?;
    let active = PathBuf::from(run(&cli, "disk path vm1 d1").await?.ok()?.stdout.trim());
    ensure!(byte_at(&active, 4)? == 1, "{}", active.display());
    vm.io("d1", "write -P 4 4M 1M").await?;
    vm.io("d1", "flush").await?;
    ensure!((byte_at(&active, 4)?, byte_at(&first[0], 4)?) == (4, 1));
    run(&cli, "check vm1").await?.ok()?;
    run(&cli, "revert vm1 b --discard").await?.ok()?;
    let active = PathBuf::from(run(&cli, "disk path vm1 d1").await?.ok()?.stdout.trim());
    ensure!(byte_at(&active, 4)? == 3);
    for point in ["aside.prepared", "aside.made", "aside.copied"] {
        let words = ["create", "vm1", "--name", "k"];
        let killed = cli.run_with(words, &[("SNAPCTL_FAULT", format!("{point}=kill").as_str())]).await?;
        killed.expect_code(KILLED)?;
        run(&cli, "recover vm1").await?.ok()?;
        let there = run(&cli, "show vm1 k").await?.code == 0;
        ensure!(there == (point == "aside.copied"), "{point}");
    }
    // Nothing is left when all is deleted: the volumes of the disks, and no other.
    let listed = run(&cli, "list vm1 --json").await?.ok()?.json()?;
    for snapshot in listed["snapshots"].as_array().context("snapshots")? {
        run(&cli, &format!("delete vm1 {}", snapshot["name"].as_str().context("name")?)).await?.ok()?;
    }
    let left = sh("lvs --noheadings -o lv_name vg0")?;
    ensure!(left.split_whitespace().count() == 3, "{left}");
    run(&cli, "check vm1").await?.ok()?;

    // A pool that is near its end takes no point.
    drop(vm);
    let full = sh("lvs --noheadings -o lv_path vg0 | grep v1 | head -1")?;
    sh(&format!(
        "lvcreate -q -V 250M -T vg0/pool0 -n filler; dd if=/dev/urandom of=/dev/vg0/filler bs=1M count=230 oflag=direct status=none; echo {full}"
    ))?;
    let disks = [("d1", run(&cli, "disk path vm1 d1").await?.ok()?.stdout.trim().to_owned())];
    let _vm = Held::start(dir.path(), &disks).await?;
    let refused = run(&cli, "create vm1 --name full").await?;
    assert_says(&refused.expect_code(7)?.stderr, &["data of thin pool t1", "% full"]);
    Ok(())
}

/// Thick volumes and partitions share nothing: overlays go where the user says, and back into the device.
#[tokio::test]
async fn j7_disks_on_devices_stand_below_overlays_elsewhere() -> Result<()> {
    if !is_inside() {
        let vm = HostVm::default().disk(128).disk(64).modules(&["dm-mod"]);
        return run_test(&vm, "aside::j7_disks_on_devices_stand_below_overlays_elsewhere").await;
    }
    sh("pvcreate -q /dev/vda; vgcreate -q vg0 /dev/vda")?;
    let cli = Cli::new()?;
    run(&cli, "pool define l1 lvm --vg vg0").await?.ok()?;
    run(&cli, "pool define k1 disk --device /dev/vdb --initialize").await?.ok()?;
    run(&cli, "volume create l1 v1 16M").await?.ok()?;
    run(&cli, "volume create k1 v2 16M").await?.ok()?;
    let dir = tempfile::tempdir()?;
    let overlays = dir.path().join("overlays");
    std::fs::create_dir(&overlays)?;
    let disks = [("d1", "/dev/vg0/v1".to_owned()), ("d2", "/dev/vdb1".to_owned())];
    let mut vm = Held::start(dir.path(), &disks).await?;
    run(&cli, &format!("vm add vm1 --qmp {}", dir.path().join("qmp").display())).await?.ok()?;
    vm.io("d1", "write -P 1 0 4M").await?;
    vm.io("d2", "write -P 2 0 4M").await?;
    let refused = run(&cli, "create vm1").await?;
    assert_says(&refused.expect_code(7)?.stderr, &["block device", "--overlay-dir"]);
    run(&cli, "create vm1 --overlay-dir /does/not/exist").await?.expect_code(2)?;
    let line = format!("create vm1 --overlay-dir {}", overlays.display());
    let created = run(&cli, &format!("{line} --name a")).await?;
    assert_says(&created.ok()?.stderr, &["note: on overlays, since", "no thin volume"]);
    vm.io("d1", "write -P 3 1M 1M").await?;
    vm.io("d2", "write -P 4 1M 1M").await?;
    run(&cli, "create vm1 --name b").await?.ok()?;
    vm.io("d1", "write -P 5 2M 1M").await?;
    run(&cli, "check vm1 --deep").await?.ok()?;
    ensure!((byte_at(Path::new("/dev/vg0/v1"), 1)?, byte_at(Path::new("/dev/vdb1"), 1)?) == (1, 2));
    // Back to what the device holds, and forth.
    run(&cli, "revert vm1 a").await?.ok()?;
    run(&cli, "check vm1").await?.ok()?;
    ensure!(std::fs::read_dir(&overlays)?.count() == 6, "three layers above each device");
    run(&cli, "revert vm1 b --discard").await?.ok()?;
    let refused = run(&cli, "volume delete l1 v1").await?;
    refused.expect_code(7)?;
    // All is merged down into the devices, while the VM runs.
    for snapshot in
        run(&cli, "list vm1 --json").await?.ok()?.json()?["snapshots"].as_array().context("list")?
    {
        run(&cli, &format!("delete vm1 {}", snapshot["name"].as_str().context("name")?)).await?.ok()?;
    }
    ensure!(run(&cli, "disk path vm1 d2").await?.ok()?.stdout.trim() == "/dev/vdb1");
    ensure!(std::fs::read_dir(&overlays)?.count() == 0, "an overlay is left");
    let bytes = (byte_at(Path::new("/dev/vg0/v1"), 1)?, byte_at(Path::new("/dev/vg0/v1"), 2)?);
    ensure!(bytes == (3, 1) && byte_at(Path::new("/dev/vdb1"), 1)? == 4, "{bytes:?}");
    // And while it does not.
    run(&cli, &format!("{line} --name c")).await?.ok()?;
    vm.io("d1", "write -P 6 3M 1M").await?;
    vm.io("d1", "flush").await?;
    drop(vm);
    run(&cli, "delete vm1 c").await?.ok()?;
    ensure!(byte_at(Path::new("/dev/vg0/v1"), 3)? == 6);
    run(&cli, "check vm1").await?.ok()?;
    ensure!(std::fs::read_dir(&overlays)?.count() == 0, "an overlay is left");
    Ok(())
}
