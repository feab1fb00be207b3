//! The lab by hand: `lab fetch [distro|backports]`, `lab shell [distro|backports] [DISKS]`,
//! `lab host [--disk MIB]… [--module NAME]… -- COMMAND`, `lab demo`, `lab clean`.
//!
//! Called by `cargo xtask`. Whatever it starts ends with it: on success, on failure and on a signal.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]

mod demo;
mod fetch;
mod host;
mod shell;

use std::future::Future;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use tests::lab::Qemu;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match until_signal(run()).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let ["host", rest @ ..] = &words[..] {
        return host::run(rest).await;
    }
    let done = match words[..] {
        ["fetch"] => Qemu::ALL.into_iter().try_for_each(fetch::run),
        ["fetch", name] => fetch::run(qemu(name)?),
        ["shell"] => shell::run(Qemu::Distro, 2).await,
        ["shell", name] => shell::run(qemu(name)?, 2).await,
        ["shell", name, disks] => shell::run(qemu(name)?, disks.parse().context("how many disks?")?).await,
        ["demo"] => demo::run().await,
        ["clean"] => fetch::clean(),
        _ => bail!(
            "usage: lab fetch [distro|backports] | shell [distro|backports] [DISKS] | host [--disk MIB] [--module NAME] -- COMMAND | demo | clean"
        ),
    };
    done.map(|()| ExitCode::SUCCESS)
}

fn qemu(name: &str) -> Result<Qemu> {
    match name {
        "distro" => Ok(Qemu::Distro),
        "backports" => Ok(Qemu::Backports),
        _ => bail!("{name}: distro or backports"),
    }
}

/// Runs `work`; a signal drops it, which ends its guests and removes what they left.
async fn until_signal(work: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let number: u8 = tokio::select! {
        result = work => return result,
        _ = hang_up.recv() => 1,
        _ = interrupt.recv() => 2,
        _ = terminate.recv() => 15,
    };
    eprintln!("\nlab: interrupted; cleaned up");
    Ok(ExitCode::from(128 + number))
}
