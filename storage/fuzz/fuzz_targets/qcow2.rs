//! Any bytes, taken for a qcow2 image.
#![no_main]

mod entry;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| entry::qcow2(bytes));
