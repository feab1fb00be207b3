//! The clients and the guard against peers that break every rule, and against a real QEMU.
//!
//! One binary. Some of its tests are marked as ignored: they are the processes that the others start.
#![cfg(test)]

#[path = "../../fuzz/fuzz_targets/entry.rs"]
mod entry;
mod guard;
mod peer;
mod properties;
mod qapi_lessons;
mod qapi_oracle;
mod real_qemu;
mod transcripts;
