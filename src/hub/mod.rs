//! A hub is a folder with a registry.json and packs. [`serve`] offers it over HTTP, [`publish`] adds to it.
//!
//! Any static host does as well as `serve`; this one exists so that forkd can be tried and measured without one, with
//! a simulated round trip and bandwidth ([`shape`]). Used by the `hub` commands.

pub mod publish;
pub mod range;
pub mod serve;
pub mod shape;
pub mod static_files;
