//! How long the guest's writes stand still around a snapshot, with and without a sync before the freeze.

use anyhow::{Context, Result};
use tests::lab::{Cli, DiskSpec, Guest};

use crate::stats::{machine_with_guests, ms, percentile, version};

/// Dirty data that the guest has when the snapshot is asked for, and how fast it makes more, in MiB.
const LOADS: [(u32, u32); 3] = [(0, 0), (32, 32), (128, 64)];

/// Lets dirty pages stay until somebody syncs, as on a guest with much memory.
const KEEP_DIRTY: &str = "cd /proc/sys/vm && echo 80 > dirty_background_ratio && echo 90 > dirty_ratio";

/// Runs `rounds` rounds of either way, by turns, for each load.
pub async fn run(rounds: usize) -> Result<()> {
    println!("### Writes that stand still, with and without a sync before the freeze\n");
    println!(
        "{}; {}; {rounds} rounds of either way, by turns.\n",
        machine_with_guests(),
        version("qemu-system-x86_64")
    );
    println!(
        "| dirty data | --sync-first | freeze reply p50 | p99 | longest write p50 | p99 | longest synced write p50 | p99 |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for (mib, rate) in LOADS {
        let guest =
            Guest::spec().disk(DiskSpec::new("a").size(512 << 20)).writer(20).memory_mib(512).boot().await?;
        guest.wait_agent().await?;
        guest.shell(KEEP_DIRTY).await?;
        let mut ways = [("yes", Vec::new()), ("no", Vec::new())];
        for _ in 0..rounds {
            for (way, rounds) in &mut ways {
                rounds.push(round(&guest, way, mib, rate).await?);
            }
        }
        for (way, rounds) in &ways {
            let column = |at: usize| {
                let values: Vec<f64> = rounds.iter().map(|round: &[f64; 3]| round[at]).collect();
                format!("{} | {}", ms(percentile(&values, 0.5)), ms(percentile(&values, 0.99)))
            };
            println!("| {mib} MiB + {rate} MiB/s | {way} | {} | {} | {} |", column(0), column(1), column(2));
        }
    }
    println!(
        "\nTimes in ms. The longest write is the longest that one `write` into the page cache took in the"
    );
    println!("guest while the command ran, the longest synced write that of a record with its `fdatasync`.");
    Ok(())
}

/// The freeze's reply, the longest write, the longest synced write, in seconds.
async fn round(guest: &Guest, way: &str, mib: u32, rate: u32) -> Result<[f64; 3]> {
    let cli = Cli::with_vm("vm1", guest).await?;
    if mib > 0 {
        guest.dirty("a", mib, rate).await?;
        wait_until_dirty(guest, mib).await?;
    }
    guest.stalls().await?;
    let flag = format!("--sync-first={way}");
    let run = cli.run(["create", "vm1", "--quiesce", "--json", &flag]).await?;
    let stalls = guest.stalls().await?;
    let freeze = run.ok()?.json()?["snapshot"]["freeze"]["freezing"].as_f64().unwrap_or(f64::NAN);
    guest.wait_records(2).await?;
    Ok([freeze, stalls.dirty.as_secs_f64(), stalls.write.as_secs_f64()])
}

/// Waits until the guest has most of `mib` in dirty pages.
async fn wait_until_dirty(guest: &Guest, mib: u32) -> Result<()> {
    loop {
        let (_, text) = guest.shell("grep Dirty: /proc/meminfo").await?;
        let kib = text.split_whitespace().nth(1).context("no Dirty: in /proc/meminfo")?;
        if kib.parse::<u32>()? >= mib * 1024 * 3 / 4 {
            return Ok(());
        }
    }
}
