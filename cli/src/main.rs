//! The `snapctl` command.

mod args;
mod commands;
mod context;
mod failure;
mod output;
mod times;

use std::process::ExitCode;

use clap::Parser;

/// The hidden argument that makes this executable the thaw guard.
const GUARD_ARGUMENT: &str = "--thaw-guard";

fn main() -> ExitCode {
    // Before anything else: the guard has no use for arguments, a runtime or a terminal.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == GUARD_ARGUMENT) {
        return agent_client::guard_main();
    }
    match args::Cli::try_parse() {
        Ok(cli) => commands::run(cli),
        Err(fault) => failure::tell_usage(&fault),
    }
}
