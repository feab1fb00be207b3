//! What a start of snapctl costs, and a whole `create`.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use tests::lab::{Cli, DiskSpec, Guest, built_program};
use tokio::process::Command;

use crate::chain::collapse;
use crate::stats::{machine_with_guests, ms, percentile, version};

/// Runs each command `rounds` times.
pub async fn run(rounds: usize) -> Result<()> {
    println!("### Start-up and a whole `create`\n");
    println!("{}; {}; {rounds} rounds.\n", machine_with_guests(), version("qemu-system-x86_64"));
    println!("| command | wall p50 | p99 | peak memory |");
    println!("| --- | --- | --- | --- |");
    let root = tempfile::tempdir()?;
    let root = root.path().to_str().context("a temporary directory with an odd name")?;
    command("snapctl --version", &["--version"], rounds).await?;
    command("snapctl list (empty state)", &["--root", root, "list"], rounds).await?;

    let guest = Guest::spec().disk(DiskSpec::new("a")).boot().await?;
    guest.wait_agent().await?;
    let mut qmp = guest.lab_qmp().await?;
    for (name, flags) in [("create vm1", &[][..]), ("create vm1 --quiesce", &["--quiesce"])] {
        let cli = Cli::with_vm("vm1", &guest).await?;
        let mut walls = Vec::new();
        // The first round asks QEMU for its schema, and warms everything up.
        for _ in 0..=rounds {
            let run = cli.run(["create", "vm1"].iter().chain(flags)).await?;
            walls.push(run.ok()?.took.as_secs_f64());
            collapse(&guest, &mut qmp).await?;
            // The chain was committed behind its back, so the catalogue has to forget it.
            std::fs::remove_dir_all(cli.root().join("var"))?;
        }
        let walls = &walls[1..];
        println!("| snapctl {name} | {} | {} | |", ms(percentile(walls, 0.5)), ms(percentile(walls, 0.99)));
    }
    println!("\nWall times in ms.");
    Ok(())
}

async fn command(name: &str, arguments: &[&str], rounds: usize) -> Result<()> {
    let program = built_program("snapctl")?;
    let mut walls = Vec::new();
    let mut peaks = Vec::new();
    for _ in 0..rounds {
        let begun = Instant::now();
        let run = Command::new(&program).args(arguments).output().await?;
        walls.push(begun.elapsed().as_secs_f64());
        ensure!(run.status.success(), "{name}: {}", String::from_utf8_lossy(&run.stderr));
        peaks.push(peak(&program, arguments).await?);
    }
    let peak = percentile(&peaks, 1.0) / 1024.0;
    println!(
        "| {name} | {} | {} | {peak:.1} MiB |",
        ms(percentile(&walls, 0.5)),
        ms(percentile(&walls, 0.99))
    );
    Ok(())
}

/// The peak of the resident memory in KiB, as GNU time tells it.
async fn peak(program: &std::path::Path, arguments: &[&str]) -> Result<f64> {
    let run = Command::new("/usr/bin/time").args(["-f", "%M"]).arg(program).args(arguments).output().await;
    let run = run.context("GNU time is needed (package time)")?;
    let text = String::from_utf8_lossy(&run.stderr).into_owned();
    text.lines().last().and_then(|line| line.parse().ok()).with_context(|| format!("GNU time said {text:?}"))
}
