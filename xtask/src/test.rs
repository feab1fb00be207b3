//! `cargo xtask test`: every test, with the real VMs.

use std::process::Stdio;

use anyhow::{Result, bail};
use clap::Args;

use crate::{Setup, build, install, need};

/// What to test with.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    setup: Setup,
    /// Arguments for `cargo nextest run`, or for `cargo test` where nextest is not installed
    #[arg(last = true)]
    rest: Vec<String>,
}

/// Installs, builds, fetches the lab, and hands over to the test runner.
pub fn run(arguments: &Arguments) -> Result<()> {
    install::run(arguments.setup)?;
    println!("Building …");
    build::build(["--bins", "--tests"])?;
    let both_qemus = fetch_lab()?;
    let mut runner = build::cargo();
    if has_nextest() {
        runner.args(["nextest", "run", "--workspace"]);
    } else {
        println!("cargo-nextest is not installed; running `cargo test`.");
        runner.args(["test", "--workspace", "--no-fail-fast"]);
    }
    if !both_qemus {
        runner.env("SNAPCTL_LAB_BACKPORTS", "distro");
    }
    runner.args(&arguments.rest);
    build::become_it(runner)
}

/// Makes the lab's cache; returns whether the newer QEMU is there too, which CI demands.
pub fn fetch_lab() -> Result<bool> {
    let fetch = |what: &str| -> Result<bool> {
        Ok(build::program("lab", false)?.args(["fetch", what]).status()?.success())
    };
    if !fetch("distro")? {
        bail!("the lab cannot be made");
    }
    let backports = fetch("backports")?;
    if !backports {
        if std::env::var_os("CI").is_some_and(|value| value == "true") {
            bail!("no newer QEMU, which CI demands");
        }
        println!("NOTE: no newer QEMU here: its tests run on the distribution's QEMU instead.");
    }
    Ok(backports)
}

fn has_nextest() -> bool {
    let mut cargo = build::cargo();
    let quiet = cargo.args(["nextest", "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
    need::find("cargo-nextest").is_some() || quiet.status().is_ok_and(|status| status.success())
}
