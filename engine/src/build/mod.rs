//! Making machines: the guest kernel, recipes and their root disks, snapshots, packs.

pub mod kernel;
pub mod machine;
pub mod pack;
pub mod pack_base;
pub mod pull;
pub mod recipe;
pub mod repack;
pub mod snapshot;
pub mod tools;
pub mod trace;
pub mod unpack;
pub mod whole;
