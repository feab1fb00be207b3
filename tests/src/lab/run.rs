//! Running a helper program to its end.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::need;

/// Returns where `name` is.
///
/// # Errors
/// When it is not installed.
pub(super) fn program(name: &str) -> Result<PathBuf> {
    need::find(name)
        .with_context(|| format!("{name} is not installed; `cargo xtask test` installs what is missing"))
}

/// Runs `command` and returns its standard output.
///
/// # Errors
/// When it cannot be started or fails; the message holds its arguments and what it said.
pub(super) fn output(command: &mut Command) -> Result<String> {
    let (ok, stdout, stderr) = outcome(command)?;
    if !ok {
        bail!("{command:?} failed: {}", stderr.trim());
    }
    Ok(stdout)
}

/// Runs `command` and returns whether it succeeded, its standard output and its standard error.
///
/// # Errors
/// When it cannot be started.
pub(super) fn outcome(command: &mut Command) -> Result<(bool, String, String)> {
    command.stdin(Stdio::null());
    let out = command.output().with_context(|| format!("{command:?}"))?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((out.status.success(), text(out.stdout), text(out.stderr)))
}
