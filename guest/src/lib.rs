//! The host's client of the agent; the agent itself is the binary `forkd-agent` (`main.rs`).

pub mod client;
