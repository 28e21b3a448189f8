//! Looking at a pack, at what differs between two, and at the memory of a child.

pub mod child_memory;
pub mod diff;
mod heatmap;
pub mod pack;
pub mod working_set;
