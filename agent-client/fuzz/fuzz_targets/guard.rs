//! Any bytes, said by an agent to the thaw guard in and after a freeze.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| agent_client::fuzz_guard(bytes));
