//! The `snapctl` command.

mod args;
mod commands;
mod context;
mod failure;
mod line;
mod output;
mod times;

use std::process::ExitCode;

use clap::Parser;

/// The hidden argument that makes this executable the thaw guard.
const GUARD_ARGUMENT: &str = "--thaw-guard";

/// The hidden argument that makes this executable the resume guard.
const RESUME_GUARD_ARGUMENT: &str = "--resume-guard";
/// The hidden argument that makes this executable a program that ends with its parent.
const TIED_ARGUMENT: &str = "--tied";

fn main() -> ExitCode {
    // Before anything else: these have no use for a command line or a terminal.
    match std::env::args_os().nth(1) {
        Some(argument) if argument == GUARD_ARGUMENT => return agent_client::guard_main(),
        Some(argument) if argument == RESUME_GUARD_ARGUMENT => return commands::resume_guard(),
        Some(argument) if argument == TIED_ARGUMENT => return host::tied::main(std::env::args_os().skip(2)),
        _ => {}
    }
    match args::Cli::try_parse() {
        Ok(cli) => commands::run(cli),
        Err(fault) => failure::tell_usage(&fault),
    }
}
