//! What forkd keeps on this machine: directories, snapshots, run directories, mounts.

pub mod branches;
pub mod daemon;
pub mod host;
pub mod lifetime;
pub mod lineage;
pub mod mounts;
pub mod paths;
pub mod run_dir;
pub mod snapshot_list;
pub mod snapshots;
pub mod sparse;
pub mod whole_memory;
pub mod work_dir;
pub mod workspace;
