//! Any bytes, said by a monitor or an agent.
#![no_main]

mod entry;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| entry::conversation(bytes));
