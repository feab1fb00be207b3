//! `cargo xtask bench`: figures about snapctl beside the peer or the limit, in the same run.
//!
//! Ratios and medians, since machines differ and are busy. What is printed is Markdown, fit for
//! `docs/benchmarks.md`.

#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

mod bare;
mod chain;
mod freeze;
mod merge;
mod net;
mod pool;
mod stall;
mod startup;
mod stats;

use anyhow::{Result, bail};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: usize| match arguments.get(at) {
        Some(text) => text.parse().map_err(|_| anyhow::anyhow!("{text:?} is no number of rounds")),
        None => Ok(default),
    };
    match arguments.first().map(String::as_str) {
        Some("freeze") => freeze::run(number(1, 200)?).await,
        Some("chain") => merge::chain(number(1, 5)?).await,
        Some("depth") => merge::depth(number(1, 20)?).await,
        Some("net") => net::run(number(1, 15)?),
        Some("net-inside") => net::inside(number(1, 15)?, arguments.get(2)).await,
        Some("pool") => pool::run(number(1, 9)?).await,
        Some("stall") => stall::run(number(1, 20)?).await,
        Some("startup") => startup::run(number(1, 50)?).await,
        _ => bail!("usage: bench freeze|stall|startup|chain|depth|pool|net [ROUNDS]"),
    }
}
