//! Every command that snapctl sends is one that the QEMU at hand knows, with arguments that fit.
//!
//! Taken from the conversation itself (`-vv`), so that a command that somebody adds is checked too.

use agent_client::Schema;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use tests::lab::{self, Cli, DiskSpec, Guest, Qemu};

/// Commands of a snapshot that have to be among those that were seen.
const EXPECTED: [&str; 9] = [
    "qmp_capabilities",
    "query-block",
    "blockdev-add",
    "blockdev-create",
    "transaction",
    "query-jobs",
    "block-stream",
    "job-finalize",
    "human-monitor-command",
];

async fn every_command_fits(qemu: Qemu) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let guest =
        Guest::spec().disks([DiskSpec::new("a"), DiskSpec::new("b").raw().drive()]).qemu(qemu).boot().await?;
    guest.wait_agent().await?;
    let schema = guest.lab_qmp().await?.call("query-qmp-schema", json!({})).await?;
    let schema = Schema::parse(&schema.to_string())?;
    let cli = Cli::with_vm("vm1", &guest).await?;

    let mut seen = Vec::new();
    // The second one undoes, so that what undoing sends is seen as well.
    for (env, code) in [(vec![], 0), (vec![("SNAPCTL_FAULT", "create.prepared=error")], 1)] {
        let run = cli.run_with(["-vv", "create", "vm1", "--quiesce"], &env).await?;
        run.expect_code(code)?;
        seen.extend(commands(&run.stderr)?);
    }
    for line in [["-vv", "flatten", "vm1", "--bandwidth=1G"], ["-vv", "delete", "vm1", "latest"]] {
        seen.extend(commands(&cli.run(line).await?.ok()?.stderr)?);
    }
    for (command, arguments) in &seen {
        schema.validate(command, arguments).with_context(|| format!("{command} {arguments}"))?;
    }
    for expected in EXPECTED {
        assert!(seen.iter().any(|(command, _)| command == expected), "{expected} was not seen in {seen:?}");
    }
    // It takes its format from a default and its path from where QEMU runs (Q14).
    assert!(!seen.iter().any(|(command, _)| command == "blockdev-snapshot-sync"));
    assert!(seen.iter().any(|(command, _)| command == "blockdev-del"), "nothing was undone: {seen:?}");
    Ok(())
}

/// The QMP commands in a conversation: those with an `id`, which the agent's have not.
fn commands(stderr: &str) -> Result<Vec<(String, Value)>> {
    let lines = stderr.lines().filter_map(|line| line.split_once("> `")?.1.strip_suffix('`'));
    let sent: Vec<Value> = lines.map(serde_json::from_str).collect::<Result<_, _>>()?;
    let ours = sent.into_iter().filter(|sent| sent.get("id").is_some());
    Ok(ours
        .map(|sent| (sent["execute"].as_str().unwrap_or_default().to_owned(), sent["arguments"].clone()))
        .collect())
}

#[tokio::test]
async fn t20_every_command_fits_the_distributions_qemu() -> Result<()> {
    every_command_fits(Qemu::Distro).await
}

#[tokio::test]
async fn t20_every_command_fits_the_newer_qemu() -> Result<()> {
    every_command_fits(Qemu::Backports).await
}
