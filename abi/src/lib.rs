//! What the host and the code inside a forkd machine must both know. It imports nothing of the project.
//!
//! [`protocol`] is the byte stream between the host and the agent, [`doorbell`] the I/O ports between guest and
//! monitor, [`generation`] what a resumed copy is told about itself. [`netlink`] is how both ends of a copy's wire are
//! set up.
#![forbid(unsafe_code)]

pub mod doorbell;
pub mod generation;
pub mod netlink;
pub mod protocol;
