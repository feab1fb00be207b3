//! The commands: each parses nothing, decides nothing, and prints.

mod check;
mod copying;
mod create;
mod delete;
mod disk;
mod doctor;
mod guest;
mod inside;
mod list;
mod memory;
mod merging;
mod net;
mod pool;
mod protect;
mod prune;
mod recover;
mod revert;
mod show;
mod tree;
mod vm;
mod volume;

use std::process::ExitCode;

use clap::CommandFactory;
use serde_json::json;

use crate::args::{Cli, Command};
use crate::context::Context;
use crate::{failure, output};

/// Runs the command and gives the exit code.
pub fn run(cli: Cli) -> ExitCode {
    let (json, quiet) = (cli.global.json, cli.global.quiet);
    output::talk(cli.global.verbose);
    let done = Context::new(&cli.global).and_then(|context| {
        // One thread: what takes time here is QEMU and the guest, and a start should cost nothing.
        runtime()?.block_on(dispatch(&context, cli.command))
    });
    done.unwrap_or_else(|fault| failure::tell(&fault, json, quiet))
}

/// Runs the resume guard.
pub fn resume_guard() -> ExitCode {
    runtime().map_or(ExitCode::FAILURE, |runtime| runtime.block_on(snapshot::resume_guard_main()))
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

async fn dispatch(context: &Context, command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Create(args) => create::run(context, &args).await,
        Command::Protect(args) => protect::run(context, &args, true).await,
        Command::Unprotect(args) => protect::run(context, &args, false).await,
        Command::Prune(args) => prune::run(context, &args).await,
        Command::Revert(args) => revert::run(context, &args).await,
        Command::Delete(args) => delete::delete(context, &args).await,
        Command::Flatten(args) => delete::flatten(context, &args).await,
        Command::List(args) => list::run(context, &args).await,
        Command::Show(args) => show::run(context, &args).await,
        Command::Tree(args) => tree::run(context, &args).await,
        Command::Check(args) => check::run(context, &args).await,
        Command::Recover(args) => recover::run(context, &args).await,
        Command::Vm(args) => vm::run(context, args).await,
        Command::Guest(args) => guest::run(context, args).await,
        Command::Disk(args) => disk::run(context, args).await,
        Command::Net(args) => net::run(context, args).await,
        Command::Pool(args) => pool::run(context, args).await,
        Command::Volume(args) => volume::run(context, args).await,
        Command::Doctor(args) => doctor::run(context, &args).await,
        Command::Completions(args) => {
            // Into memory: clap_complete panics where it cannot write, for example into `| head -1`.
            let mut script = Vec::new();
            clap_complete::generate(args.shell, &mut Cli::command(), "snapctl", &mut script);
            output::line(String::from_utf8(script)?.trim_end())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Version => version(context),
    }
}

fn version(context: &Context) -> anyhow::Result<ExitCode> {
    let version = env!("CARGO_PKG_VERSION");
    if context.json {
        output::document("snapctl.version/1", &json!({ "version": version }))?;
    } else {
        output::line(&format!("snapctl {version}"))?;
    }
    Ok(ExitCode::SUCCESS)
}
