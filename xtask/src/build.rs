//! Building programs of the workspace and handing over to them.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Returns a cargo that works on this workspace, wherever it was called from.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    cargo
}

/// Builds what `arguments` of `cargo build` select.
///
/// # Errors
/// When cargo fails; it has said why.
pub fn build<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Result<()> {
    let status =
        cargo().args(["build", "--quiet", "--workspace"]).args(arguments).status().context("cargo")?;
    if !status.success() {
        bail!("the build failed");
    }
    Ok(())
}

/// Returns a command for a built program; `release` says which profile it was built with.
///
/// # Errors
/// When this program does not know where it is itself.
pub fn program(name: &str, release: bool) -> Result<Command> {
    let own = std::env::current_exe()?;
    // `cargo xtask` is built with the dev profile, in `TARGET/debug`.
    let target = own.ancestors().nth(2).context("no target directory")?;
    let path: PathBuf = target.join(if release { "release" } else { "debug" }).join(name);
    Ok(Command::new(path))
}

/// Lets `command` take this process's place.
///
/// # Errors
/// When it cannot be started; otherwise it does not return.
pub fn become_it(mut command: Command) -> Result<()> {
    let error = command.exec();
    Err(error).with_context(|| format!("{command:?}"))
}
