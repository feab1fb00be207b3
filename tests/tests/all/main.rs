//! The end-to-end tests: one binary, one module for each subject.

#![allow(clippy::print_stderr, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod architecture;
mod aside;
mod bitmaps;
mod cli_text;
mod copy;
mod create;
mod deep;
mod delete;
mod freeze;
mod full;
mod internal;
mod kill;
mod lab;
mod luks;
mod memory;
mod networks;
mod platform;
mod pools;
mod prune;
mod refusals;
mod revert;
mod schema;
mod soak;
mod support;
