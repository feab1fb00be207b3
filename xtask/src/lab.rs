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
    /// Run a command as root in a throwaway VM that is a whole host: this one's files, Debian's kernel, disks of its own
    Host {
        #[command(flatten)]
        setup: Setup,
        /// One more empty disk, of so many MiB: /dev/vda, /dev/vdb, …
        #[arg(long = "disk", value_name = "MIB")]
        disks: Vec<u64>,
        /// A kernel module to load, for example dm-thin-pool
        #[arg(long = "module", value_name = "NAME")]
        modules: Vec<String>,
        /// The command
        #[arg(last = true, required = true)]
        command: Vec<String>,
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
        Command::Host { setup, disks, modules, command } => {
            install::run(*setup)?;
            lab.arg("host");
            lab.args(disks.iter().flat_map(|mib| ["--disk".to_owned(), mib.to_string()]));
            lab.args(modules.iter().flat_map(|name| ["--module", name]));
            lab.arg("--").args(command);
        }
        Command::Clean => {
            lab.arg("clean");
        }
    }
    build::become_it(lab)
}
