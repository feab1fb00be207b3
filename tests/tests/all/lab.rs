//! The lab itself: what the other tests stand on.

use anyhow::Result;
use tests::lab::{self, DiskSpec, Guest, Qemu, check_same_instant};

async fn boots_writes_and_is_read_back(qemu: Qemu) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let disks = [DiskSpec::new("a"), DiskSpec::new("b").raw().scsi().drive().iothread()];
    let mut guest = Guest::spec().disks(disks).qemu(qemu).writer(100).cdrom().boot().await?;
    eprintln!("booted in {:?} on {qemu:?}", guest.boot_time());

    let first = guest.wait_records(5).await?;
    let second = guest.wait_records(5).await?;
    assert!(second["a"] >= first["a"] + 5 && second["b"] > first["b"], "{first:?} {second:?}");
    let mut qmp = guest.lab_qmp().await?;
    assert_eq!(qmp.call("query-status", serde_json::json!({})).await?["status"], "running");

    let synced = guest.progress()?;
    guest.kill().await?;
    let mut layers = Vec::new();
    for disk in guest.mounted() {
        let layer = lab::Layer::copy(&disk.path, disk.spec.format.driver())?;
        assert!(layer.fs_state()?.needs_recovery, "{} was mounted when its guest was killed", disk.id());
        let records = layer.records()?;
        assert!(records.len() as u64 >= synced[disk.id()], "{}: {} < {synced:?}", disk.id(), records.len());
        layers.push(records);
    }
    check_same_instant(&layers)
}

#[tokio::test]
async fn a_guest_boots_writes_and_is_read_back_on_the_distributions_qemu() -> Result<()> {
    boots_writes_and_is_read_back(Qemu::Distro).await
}

#[tokio::test]
async fn a_guest_boots_writes_and_is_read_back_on_the_newer_qemu() -> Result<()> {
    boots_writes_and_is_read_back(Qemu::Backports).await
}
