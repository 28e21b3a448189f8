//! forkd packs: the chunk-indexed format, the verified chunk store and the mount.
//!
//! A pack is an ordinary `.tar.zst` whose frames are indexed, so that any part of any file in it can be fetched by an
//! HTTP range request, checked against a digest and decoded on its own. [`store::Store`] is the sole read path: the
//! mount ([`tree`], [`fuse`]), the machine monitor's page source (in the `forkd` crate), [`unpack`] and `inspect` all
//! read through it. [`writer`] makes packs; [`legacy`] reads the predecessor's.
#![forbid(unsafe_code)]

pub mod cache;
pub mod chain;
pub mod digest;
pub mod erofs;
pub mod format;
pub mod fuse;
pub mod index;
pub mod legacy;
pub mod manifest;
pub mod observe;
pub mod prefetch;
mod scan;
pub mod source;
pub mod store;
pub mod trace;
pub mod tree;
pub mod unpack;
pub mod writer;
