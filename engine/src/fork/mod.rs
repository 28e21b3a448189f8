//! Copies of a machine: what they are forked from, starting and looking after them, asking them.

pub mod agent;
pub mod ask;
pub mod branch;
pub mod child_snapshot;
pub mod children;
pub mod copy;
pub mod forward;
pub mod identity;
pub mod opening;
pub mod pagemap;
pub mod quiet;
pub mod report;
pub mod run;
pub mod scratch;
pub mod start_queue;
pub mod supervisor;
pub mod template;
pub mod tree;
pub mod variables;
pub mod warm;
pub mod zygote;
