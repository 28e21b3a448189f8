//! The devices of a machine. Guests may write anything into their registers and queues; no device trusts them.

pub mod bus;
pub mod cmos;
pub mod doorbell;
pub mod serial;
pub mod virtio;
