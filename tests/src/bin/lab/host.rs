//! `lab host`: a command in the host VM.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use tests::lab::HostVm;

/// Runs what is behind `--`, with the disks and modules named before it, and ends with its exit code.
pub async fn run(words: &[&str]) -> Result<ExitCode> {
    let mut vm = HostVm::default();
    let mut words = words;
    let command = loop {
        (vm, words) = match words {
            ["--disk", mib, rest @ ..] => (vm.disk(mib.parse().context("--disk MIB")?), rest),
            ["--module", name, rest @ ..] => (vm.modules(&[name]), rest),
            ["--", command @ ..] if !command.is_empty() => break command,
            _ => bail!("usage: lab host [--disk MIB]... [--module NAME]... -- COMMAND..."),
        };
    };
    let ran = vm.run(command).await?;
    print!("{}", ran.output);
    Ok(ExitCode::from(u8::try_from(ran.code).unwrap_or(1)))
}
