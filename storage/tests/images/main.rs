//! Storage against real images, made by the real `qemu-img`, on the real file system.
#![cfg(test)]

mod chain;
#[path = "../../fuzz/fuzz_targets/entry.rs"]
mod entry;
mod map;
mod overlay;
mod qcow2;
mod seal;
mod support;
