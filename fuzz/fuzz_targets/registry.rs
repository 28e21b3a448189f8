//! `cargo fuzz run registry`
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forkd_fuzz::registry(bytes));
