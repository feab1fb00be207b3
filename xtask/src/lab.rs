//! `cargo xtask lab …`: the lab by hand.

use anyhow::Result;
use clap::Subcommand;

use crate::{Setup, build, install};

/// What to do with the lab.
#[derive(Subcommand)]
pub enum Command {
    /// Fetch the kernel and the second QEMU, and build the initramfs
    Fetch(Setup),
    /// Boot a guest that writes, print its sockets, and keep it until Ctrl-C
    Shell {
        #[command(flatten)]
        setup: Setup,
        /// Run it on the newer QEMU
        #[arg(long)]
        backports: bool,
        /// How many disks it has
        #[arg(long, default_value_t = 2)]
        disks: u32,
    },
    /// Remove everything that the lab has cached
    Clean,
}

/// Builds and hands over to `lab`.
pub fn run(command: &Command) -> Result<()> {
    build::build(["--bin", "lab", "--bin", "lab-guest"])?;
    let mut lab = build::program("lab", false)?;
    match command {
        Command::Fetch(setup) => {
            install::run(*setup)?;
            lab.arg("fetch");
        }
        Command::Shell { setup, backports, disks } => {
            install::run(*setup)?;
            lab.args(["shell", if *backports { "backports" } else { "distro" }, &disks.to_string()]);
        }
        Command::Clean => {
            lab.arg("clean");
        }
    }
    build::become_it(lab)
}
