//! `lab shell`: a guest to play with.

use std::future::pending;

use anyhow::Result;
use tests::lab::{DiskSpec, Guest, Qemu};

/// Boots a guest that writes, says how to reach it, and keeps it until a signal comes.
pub async fn run(qemu: Qemu, disks: u32) -> Result<()> {
    let names = (0..disks).map(|n| DiskSpec::new(&format!("disk{n}")).size(1 << 30));
    let mut guest = Guest::spec().disks(names).qemu(qemu).writer(50).cdrom().boot().await?;
    println!(
        "up after {:.1} s, pid {}, in {}",
        guest.boot_time().as_secs_f64(),
        guest.pid(),
        guest.dir().display()
    );
    println!("  snapctl vm add vm1 --qmp {} --agent {}", guest.qmp().display(), guest.agent().display());
    println!("  a second QMP socket: {}", guest.qmp_lab().display());
    for disk in guest.disks() {
        println!("  {}: {}", disk.id(), disk.path.display());
    }
    println!("Ctrl-C ends it.");
    tokio::select! {
        () = pending() => Ok(()),
        ended = guest.wait_exit() => ended,
    }
}
