//! The lab itself: what the other tests stand on.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;
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
    assert_eq!(qmp.call("query-status", json!({})).await?["status"], "running");

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

async fn hotplugs_a_nic_into_a_free_port(qemu: Qemu) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let guest = Guest::spec().qemu(qemu).boot().await?;
    let mut qmp = guest.lab_qmp().await?;
    let nic = json!({"driver": "virtio-net-pci", "id": "nic0", "bus": "rp0", "mac": "52:54:00:11:22:33"});
    qmp.call("device_add", nic).await?;
    let seen = "until grep -q 52:54:00:11:22:33 /sys/class/net/*/address; do usleep 20000; done; echo seen";
    assert_eq!(guest.shell(seen).await?, (0, "seen\n".to_owned()));
    qmp.call("device_del", json!({"id": "nic0"})).await?;
    qmp.event("DEVICE_DELETED", Duration::from_secs(20)).await?;
    Ok(())
}

#[tokio::test]
async fn a_nic_is_hotplugged_on_the_distributions_qemu() -> Result<()> {
    hotplugs_a_nic_into_a_free_port(Qemu::Distro).await
}

#[tokio::test]
async fn a_nic_is_hotplugged_on_the_newer_qemu() -> Result<()> {
    hotplugs_a_nic_into_a_free_port(Qemu::Backports).await
}

async fn comes_back_after_a_reset(qemu: Qemu) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let args = ["-action", "reboot=reset"];
    let guest = Guest::spec().disk(DiskSpec::new("a")).qemu(qemu).writer(50).args(args).boot().await?;
    let before = guest.wait_records(5).await?;
    let mut qmp = guest.lab_qmp().await?;
    qmp.call("system_reset", json!({})).await?;
    qmp.event("RESET", Duration::from_secs(20)).await?;
    guest.wait_agent().await?;
    guest.start_writer(50).await?;
    let after = guest.wait_records(5).await?;
    assert!(after["a"] >= before["a"] + 5, "the writer goes on where it was: {before:?} {after:?}");
    Ok(())
}

#[tokio::test]
async fn a_reset_guest_comes_back_on_the_distributions_qemu() -> Result<()> {
    comes_back_after_a_reset(Qemu::Distro).await
}

#[tokio::test]
async fn a_reset_guest_comes_back_on_the_newer_qemu() -> Result<()> {
    comes_back_after_a_reset(Qemu::Backports).await
}

#[tokio::test]
async fn a_guest_that_lost_power_boots_again_and_loses_nothing_synced() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let guest = Guest::spec().disk(DiskSpec::new("a").throttle()).writer(0).boot().await?;
    guest.dirty("a", 4, 8).await?;
    let before = guest.wait_records(20).await?;
    let stalls = guest.stalls().await?;
    assert!(stalls.writes >= 20 && stalls.dirties > 0 && !stalls.write.is_zero(), "{stalls:?}");
    let guest = guest.boot_again(|disk| (disk.path.clone(), disk.spec.format)).await?;
    assert_eq!(guest.shell("grep -c ' /data/a ext4 ' /proc/mounts").await?, (0, "1\n".to_owned()));
    guest.stop_writer().await?;
    let disk = &guest.disks()[0];
    let records = lab::read_records(&disk.path, disk.spec.format.driver())?;
    assert!(records.len() as u64 >= before["a"], "{} < {before:?}", records.len());
    Ok(())
}
