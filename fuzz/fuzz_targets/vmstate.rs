//! `cargo fuzz run vmstate`
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forkd_fuzz::vmstate(bytes));
