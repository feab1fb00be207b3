//! `cargo xtask …`: what a developer runs. Each subcommand is a module.
//!
//! Whatever needs the lab is a program of the `tests` crate; here it is built and then takes this
//! process's place, so that Ctrl-C and the exit code are its own.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a tool of the developers")]

mod bench;
mod build;
mod demo;
mod install;
mod lab;
mod licences;
#[path = "../../tests/src/lab/need.rs"]
mod need;
mod soak;
mod test;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Set-up, tests, the demo and the benchmarks of snapctl.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a throwaway VM and snapshot it while it writes; cleans up after itself
    Demo(Setup),
    /// Run every test, with the real VMs
    Test(test::Arguments),
    /// Take, revert, merge and prune snapshots at random while a guest writes, and kill the tool meanwhile
    Soak(soak::Arguments),
    /// Measure snapctl
    Bench(bench::Arguments),
    /// The lab by hand
    #[command(subcommand)]
    Lab(lab::Command),
    /// Check licences and duplicate versions against deny.toml
    Licences,
}

/// What a subcommand that needs programs of the system may do about missing ones.
#[derive(Args, Clone, Copy)]
struct Setup {
    /// Only say which programs are missing; install nothing
    #[arg(long)]
    no_install: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Soak(arguments) => soak::run(&arguments),
        Command::Demo(setup) => demo::run(setup),
        Command::Test(arguments) => test::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Lab(command) => lab::run(&command),
        Command::Licences => licences::run(),
    }
}
