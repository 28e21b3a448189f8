//! `cargo fuzz run legacy`
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forkd_fuzz::legacy(bytes));
