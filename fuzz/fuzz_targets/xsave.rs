//! `cargo fuzz run xsave`
#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| forkd_fuzz::xsave(bytes));
