//! The network of a copy.

pub mod wire;
