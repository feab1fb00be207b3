//! The freeze window of `snapctl create --quiesce`, beside the same three round trips made bare.

use anyhow::{Context, Result};
use tests::lab::{Cli, DiskSpec, Guest};

use crate::bare::{Trips, freeze_switch_thaw};
use crate::chain::{collapse, prepare};
use crate::stats::{machine_with_guests, ms, percentile, version};

/// What one side of the comparison took, a value for each round, in seconds.
#[derive(Debug, Default)]
struct Side {
    window: Vec<f64>,
    freeze: Vec<f64>,
    switch: Vec<f64>,
}

/// Runs `rounds` rounds of either side, by turns, for 1, 4 and 16 disks.
pub async fn run(rounds: usize) -> Result<()> {
    println!("### Freeze window\n");
    println!(
        "{}; {}; {rounds} rounds of either side, by turns.\n",
        machine_with_guests(),
        version("qemu-system-x86_64")
    );
    println!("| disks | side | window p50 | p99 | freeze reply p50 | p99 | QMP part p50 | p99 |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for disks in [1, 4, 16] {
        let (ours, floor) = compare(disks, rounds).await?;
        row(disks, "snapctl", &ours);
        row(disks, "bare client", &floor);
        let ratio = |of: f64| percentile(&ours.window, of) / percentile(&floor.window, of);
        println!("| {disks} | ratio | {:.2} × | {:.2} × | | | | |", ratio(0.5), ratio(0.99));
    }
    println!("\nTimes in ms.");
    Ok(())
}

async fn compare(disks: usize, rounds: usize) -> Result<(Side, Side)> {
    let specs = (0..disks).map(|index| DiskSpec::new(&format!("d{index}")).size(16 << 20));
    let guest = Guest::spec().disks(specs).boot().await?;
    guest.wait_agent().await?;
    let mut qmp = guest.lab_qmp().await?;
    let (mut ours, mut floor) = (Side::default(), Side::default());
    for _ in 0..rounds {
        ours.push(snapctl(&guest).await?);
        collapse(&guest, &mut qmp).await?;
        let transaction = prepare(&guest, &mut qmp).await?;
        floor.push(freeze_switch_thaw(&guest.qmp(), &guest.agent(), &transaction)?);
        collapse(&guest, &mut qmp).await?;
    }
    Ok((ours, floor))
}

/// One snapshot by the real program, with a state of its own: the chain is committed back behind its back.
async fn snapctl(guest: &Guest) -> Result<Trips> {
    let cli = Cli::with_vm("vm1", guest).await?;
    let run = cli.run(["create", "vm1", "--quiesce", "--json"]).await?;
    let snapshot = run.ok()?.json()?["snapshot"].take();
    let freeze = &snapshot["freeze"];
    let seconds = |name: &str| freeze[name].as_f64().with_context(|| format!("no {name} in {freeze}"));
    Ok(Trips { freeze: seconds("freezing")?, switch: seconds("switching")?, window: seconds("window")? })
}

impl Side {
    fn push(&mut self, trips: Trips) {
        self.window.push(trips.window);
        self.freeze.push(trips.freeze);
        self.switch.push(trips.switch);
    }
}

fn row(disks: usize, name: &str, side: &Side) {
    let both = |values: &[f64]| format!("{} | {}", ms(percentile(values, 0.5)), ms(percentile(values, 0.99)));
    println!(
        "| {disks} | {name} | {} | {} | {} |",
        both(&side.window),
        both(&side.freeze),
        both(&side.switch)
    );
}
