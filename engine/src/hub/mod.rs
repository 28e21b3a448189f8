//! Packs of a hub: its registry, and publishing, serving and downloading them.

pub mod bases;
pub mod cached;
pub mod client;
pub mod download;
pub mod listing;
pub mod mount;
pub mod page;
pub mod publish;
pub mod range;
pub mod registry;
pub mod release;
pub mod serve;
pub mod shape;
pub mod static_files;
