//! Copies of a machine: what they are forked from, starting and looking after them, asking them.

pub mod agent;
pub mod identity;
pub mod pagemap;
pub mod scratch;
pub mod source;
pub mod supervisor;
pub mod template;
pub mod turns;
pub mod variables;
pub mod warm;
