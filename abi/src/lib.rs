//! What the host and the code inside a forkd machine must both know. It imports nothing of the project.
//!
//! [`protocol`] is the byte stream between the host and the agent, [`doorbell`] the I/O ports between guest and
//! monitor, [`generation`] what a resumed copy is told about itself. [`netlink`] is how both ends of a copy's wire are
//! set up, [`chain`] how errors are told across.
#![forbid(unsafe_code)]

pub mod chain;
pub mod doorbell;
pub mod frames;
pub mod generation;
pub mod netlink;
pub mod protocol;
