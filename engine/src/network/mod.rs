//! The network of a copy: its wire, the gateway at the other end, and the rules about where it leads.

pub mod gateway;
mod names;
pub mod policy;
pub mod rate;
mod routes;
pub mod rule;
pub mod traffic;
pub mod wire;
