//! `cargo xtask soak`: the random life of a chain, for as long as one likes.

use anyhow::Result;
use clap::Args;

use crate::{Setup, build, install, test};

/// How long, and from which seed.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    setup: Setup,
    /// How long it lasts, on both QEMUs at once
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// The choices of an earlier run [default: other ones each time]
    #[arg(long)]
    seed: Option<u64>,
}

/// Installs, builds, fetches the lab, and hands over to the test.
pub fn run(arguments: &Arguments) -> Result<()> {
    install::run(arguments.setup)?;
    build::build(["--bins", "--tests"])?;
    let both_qemus = test::fetch_lab()?;
    // Not nextest: it would end a test that takes so long.
    let mut runner = build::cargo();
    runner.args(["test", "-p", "tests", "--test", "all", "--", "soak::", "--nocapture", "--test-threads=2"]);
    runner.env("SNAPCTL_SOAK_SECONDS", (arguments.minutes * 60).to_string());
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let seed = arguments.seed.unwrap_or(clock.subsec_nanos().into());
    runner.env("SNAPCTL_SOAK_SEED", seed.to_string());
    if !both_qemus {
        runner.env("SNAPCTL_LAB_BACKPORTS", "distro");
    }
    build::become_it(runner)
}
