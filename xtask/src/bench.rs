//! `cargo xtask bench …`: figures about snapctl, as Markdown.

use anyhow::Result;
use clap::Args;

use crate::{Setup, build, install};

/// What to measure.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    setup: Setup,
    /// The name of the benchmark, and what it takes
    #[arg(trailing_var_arg = true, required = true)]
    arguments: Vec<String>,
}

/// Builds with optimisation and hands over to the `bench` program of the `tests` crate.
pub fn run(arguments: &Arguments) -> Result<()> {
    install::run(arguments.setup)?;
    build::build(["--release", "--bin", "snapctl", "--bin", "bench", "--bin", "lab-guest"])?;
    let mut bench = build::program("bench", true)?;
    bench.args(&arguments.arguments);
    build::become_it(bench)
}
