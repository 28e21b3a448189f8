//! `cargo fuzz run manifest`
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forkd_fuzz::manifest(bytes));
