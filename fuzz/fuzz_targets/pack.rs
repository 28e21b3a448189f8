//! `cargo fuzz run pack`
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forkd_fuzz::pack(bytes));
