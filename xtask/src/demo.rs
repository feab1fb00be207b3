//! `cargo xtask demo`: the main job, on a VM that is thrown away.

use anyhow::Result;

use crate::{Setup, build, install};

/// Installs, builds, and hands over to `lab demo`.
pub fn run(setup: Setup) -> Result<()> {
    install::run(setup)?;
    println!("Building …");
    build::build(["--bin", "snapctl", "--bin", "lab", "--bin", "lab-guest"])?;
    let mut demo = build::program("lab", false)?;
    demo.arg("demo");
    build::become_it(demo)
}
