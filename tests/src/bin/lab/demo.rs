//! `lab demo`: snapctl's main job, on a VM that is thrown away.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::lab::{Cli, DiskSpec, Guest, Lab, Layer, Qemu, check_same_instant};

/// Records that each disk gets in a second: visible progress, and room for the whole demo.
const RECORDS_PER_SECOND: u32 = 50;
/// How much is written before the snapshot and after it.
const SOME_RECORDS: u64 = 25;

/// Boots, registers, snapshots while the guest writes, and proves what the layers hold.
///
/// # Errors
/// When a step fails, or the proof does; everything is removed all the same.
pub async fn run() -> Result<()> {
    let lab = Lab::get()?;
    let qemu = lab.qemu(Qemu::Distro)?;
    say(&format!("Booting a throwaway VM: QEMU {}, two disks, {}", qemu.version, lab.accel()?));
    let disks = [DiskSpec::new("vda"), DiskSpec::new("vdb").raw()];
    let guest = Guest::spec().disks(disks).writer(RECORDS_PER_SECOND).boot().await?;
    guest.wait_records(SOME_RECORDS).await?;
    println!("Up in {:.1} s. It writes to both disks all the time.", guest.boot_time().as_secs_f64());
    println!("(Each command below runs with a --root of its own, so nothing of yours is touched.)");

    let cli = Cli::new()?;
    let (qmp, agent) = (guest.qmp().display().to_string(), guest.agent().display().to_string());
    show(&cli, &["vm", "add", "vm1", "--qmp", &qmp, "--agent", &agent]).await?;
    let synced = guest.progress()?;
    show(&cli, &["create", "vm1", "--quiesce"]).await?;
    guest.wait_records(SOME_RECORDS).await?;
    show(&cli, &["tree", "vm1"]).await?;

    say("What the frozen layers hold");
    let snapshot = cli.run(["show", "vm1", "latest", "--json"]).await?.ok()?.json()?;
    let mut records = Vec::new();
    for disk in guest.mounted() {
        let (path, format) = frozen_layer(&snapshot, disk.id())?;
        let layer = Layer::copy(&path, &format)?;
        let state = layer.fs_state()?;
        ensure!(!state.needs_recovery && state.fsck_clean, "{}: {state:?}", disk.id());
        let held = layer.records()?;
        let synced = synced[disk.id()];
        ensure!(held.len() as u64 >= synced, "{}: {} of {synced} records", disk.id(), held.len());
        println!(
            "{}: clean, no journal replay needed; {} whole records, {synced} of them synced before the command",
            disk.id(),
            held.len()
        );
        records.push(held);
    }
    check_same_instant(&records)?;
    println!("Both are of the same instant, and the guest goes on: {}", progress(&guest)?);
    drop(guest);
    say("Cleaned up: the VM, its disks and snapctl's state are gone");
    Ok(())
}

/// Runs snapctl and prints it as a person would see it.
async fn show(cli: &Cli, arguments: &[&str]) -> Result<()> {
    let run = cli.run(arguments).await?;
    println!("\n$ {}", run.line);
    print!("{}{}", run.stdout, run.stderr);
    run.ok().map(drop)
}

fn say(text: &str) {
    println!("\n== {text}");
}

fn frozen_layer(snapshot: &Value, disk: &str) -> Result<(PathBuf, String)> {
    let disks = snapshot["snapshot"]["disks"].as_array().context("`show --json` has no disks")?;
    let found =
        disks.iter().find(|entry| entry["disk"] == disk).with_context(|| format!("no disk {disk}"))?;
    let text = |key: &str| found[key].as_str().map(str::to_owned).with_context(|| format!("no {key}"));
    Ok((text("path")?.into(), text("format")?))
}

fn progress(guest: &Guest) -> Result<String> {
    let synced = guest.progress()?;
    Ok(synced.iter().map(|(disk, seq)| format!("{seq} records on {disk}")).collect::<Vec<_>>().join(", "))
}
