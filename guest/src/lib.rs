//! What the host and the code inside a forkd machine agree on, and the host's client for it.
//!
//! The binary `forkd-agent` (PID 1 and agent, `main.rs`) and the host (`forkd`, `forkd-vmm`) both build on this crate:
//! [`protocol`] is the byte stream between them, [`doorbell`] the ports between guest and monitor, [`generation`] what
//! a resumed copy is told about itself, [`client`] the blocking host side of the protocol, [`netlink`] sets up the two ends
//! of a copy's wire.

pub mod client;
pub mod doorbell;
pub mod generation;
pub mod netlink;
pub mod protocol;
