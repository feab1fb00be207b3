//! The lab: real QEMU processes with a real guest agent, for tests and for the demo.
//!
//! See [`lab`] for what a guest is made of.

pub mod lab;
