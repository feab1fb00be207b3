//! `snapctl create` on real guests that write all the time.

use anyhow::Result;
use tests::lab::{self, Cli, DiskSpec, Guest, Qemu, check_same_instant};

/// Every kind of disk that one guest can have at once.
fn all_kinds() -> [DiskSpec; 5] {
    [
        DiskSpec::new("va").iothread(),
        DiskSpec::new("vb").raw(),
        DiskSpec::new("sc").scsi().drive(),
        DiskSpec::new("sd").scsi().raw().drive(),
        DiskSpec::new("ve").throttle(),
    ]
}

async fn quiesced_on(qemu: Qemu) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut guest = Guest::spec().disks(all_kinds()).qemu(qemu).writer(50).cdrom().boot().await?;
    guest.wait_agent().await?;
    let cli = Cli::with_vm("vm1", &guest).await?;
    guest.wait_records(20).await?;
    let before = guest.progress()?;

    let run = cli.run(["create", "vm1", "--quiesce", "--name", "one", "--json"]).await?;
    let snapshot = run.ok()?.json()?["snapshot"].clone();
    assert_eq!(snapshot["consistency"], "filesystem", "{}", run.stdout);
    assert_eq!(snapshot["freeze"]["filesystems"], 5);
    let disks = snapshot["disks"].as_array().unwrap();
    assert_eq!(disks.len(), 5);

    // The guest goes on, on the overlays.
    guest.wait_records(20).await?;
    cli.run(["check", "vm1"]).await?.ok()?;
    let tree = cli.run(["tree", "vm1"]).await?;
    eprintln!("{}{}", tree.stdout, run.stderr);
    let mut layers = Vec::new();
    for disk in guest.mounted() {
        // QEMU lists its drives in an order of its own.
        let layer = disks.iter().find(|layer| layer["disk"] == disk.id()).unwrap();
        let path = std::path::Path::new(layer["path"].as_str().unwrap());
        let copy = lab::Layer::copy(path, layer["format"].as_str().unwrap())?;
        let state = copy.fs_state()?;
        assert!(!state.needs_recovery && state.fsck_clean, "{}: {state:?}", disk.id());
        let records = copy.records()?;
        assert!(records.len() as u64 >= before[disk.id()], "{}: {} records", disk.id(), records.len());
        layers.push(records);
    }
    check_same_instant(&layers)?;

    // A second one, of two disks, while the first one's chain is there.
    let run = cli.run(["create", "vm1", "--name", "two", "--disk", "va", "--disk", "sd", "--json"]).await?;
    assert_eq!(run.ok()?.json()?["snapshot"]["disks"].as_array().unwrap().len(), 2);
    guest.wait_records(20).await?;
    let synced = guest.progress()?;
    guest.kill().await?;
    // Nothing that the guest had synced is lost: the active layers hold it all.
    for disk in guest.mounted() {
        let path = cli.run(["disk", "path", "vm1", disk.id()]).await?;
        let active = std::path::Path::new(path.ok()?.stdout.trim());
        let records = lab::read_records(active, "qcow2")?;
        assert!(records.len() as u64 >= synced[disk.id()], "{}: {} < {synced:?}", disk.id(), records.len());
    }
    Ok(())
}

#[tokio::test]
async fn a_writing_guest_is_quiesced_on_the_distributions_qemu() -> Result<()> {
    quiesced_on(Qemu::Distro).await
}

#[tokio::test]
async fn a_writing_guest_is_quiesced_on_the_newer_qemu() -> Result<()> {
    quiesced_on(Qemu::Backports).await
}

/// A drive of `-blockdev` and `-device` without an id has no name but its top node's, which every snapshot
/// changes.
#[tokio::test]
async fn q5_a_disk_without_an_id_keeps_its_name_and_its_active_layer() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("nameless.raw");
    std::fs::File::create(&image)?.set_len(8 << 20)?;
    let blockdev = format!("driver=raw,node-name=d0,file.driver=file,file.filename={}", image.display());
    let args = ["-blockdev", &blockdev, "-device", "virtio-blk-pci,drive=d0"];
    let mut guest = Guest::spec().args(args).boot().await?;
    let cli = Cli::with_vm("vm1", &guest).await?;
    for name in ["one", "two", "three"] {
        cli.run(["create", "vm1", "--disk", "d0", "--name", name]).await?.ok()?;
    }
    let running = cli.run(["disk", "path", "vm1", "d0"]).await?.ok()?.stdout.clone();
    cli.run(["check", "vm1"]).await?.ok()?;
    guest.kill().await?;
    let stopped = cli.run(["disk", "path", "vm1", "d0"]).await?.ok()?.stdout.clone();
    assert_eq!(running, stopped);
    cli.run(["check", "vm1"]).await?.ok()?;
    // By its first image, too, as a start script asks that has no name for the disk.
    let by_image = cli.run(["disk", "path", "vm1", "no-such-name", "--or", image.to_str().unwrap()]).await?;
    assert_eq!(by_image.ok()?.stdout, running);
    let last = cli.run(["show", "vm1", "three", "--json"]).await?.ok()?.json()?;
    assert_eq!(last["snapshot"]["disks"][0]["overlay"], running.trim());
    lab::remove_tree(dir.path())?;
    Ok(())
}
