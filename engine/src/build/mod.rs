//! Making machines: the guest kernel, recipes and their root disks, snapshots, packs.

pub mod kernel;
pub mod machine;
pub mod recipe;
pub mod tools;
