//! Looking at a pack, and at the memory of a child.

pub mod child_memory;
mod heatmap;
pub mod pack;
pub mod working_set;
