//! `qemu-img`, for images that no QEMU writes to.

use std::ffi::OsStr;
use std::process::{Output, Stdio};

use host::tied::Tie;
use tokio::process::Command;

use crate::error::StepError;

const PROGRAM: &str = "qemu-img";
/// Most of what it says that is taken up in an error.
const MAX_SAID: usize = 500;

/// Runs it to its end, whatever that is. Dropped meanwhile, it is killed.
///
/// # Errors
/// [`StepError::QemuImg`] if it cannot be started.
pub(crate) async fn output<I, A>(arguments: I) -> Result<Output, StepError>
where
    I: IntoIterator<Item = A>,
    A: AsRef<OsStr>,
{
    let mut command = Command::new(PROGRAM);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    command.output().await.map_err(|fault| StepError::QemuImg(fault.to_string()))
}

/// Runs it, and expects it to succeed.
///
/// # Errors
/// [`StepError::QemuImg`] with what it says.
pub(crate) async fn run<I, A>(arguments: I) -> Result<(), StepError>
where
    I: IntoIterator<Item = A>,
    A: AsRef<OsStr>,
{
    let output = output(arguments).await?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(&output)),
    }
}

/// As [`run`], and it ends with this process, however that ends.
///
/// # Errors
/// As [`run`].
pub(crate) async fn run_tied<I, A>(tie: &Tie, arguments: I) -> Result<(), StepError>
where
    I: IntoIterator<Item = A>,
    A: AsRef<OsStr>,
{
    let mut command = Command::from(host::tied::command(&tie.program, &tie.argument));
    command.arg(PROGRAM).args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.map_err(|fault| StepError::QemuImg(fault.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(&output)),
    }
}

/// What it said when it failed.
pub(crate) fn failed(output: &Output) -> StepError {
    let said = String::from_utf8_lossy(&output.stderr);
    StepError::QemuImg(agent_client::printable(said.trim(), MAX_SAID))
}
