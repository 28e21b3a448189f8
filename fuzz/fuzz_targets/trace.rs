//! `cargo fuzz run trace`
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forkd_fuzz::trace(bytes));
