//! REST: what is asked over HTTP, and how it is answered.

pub mod attach;
pub mod body;
pub mod branch;
pub mod caller;
pub mod catalogue;
pub mod create;
pub mod error;
pub mod eval;
pub mod exec;
pub mod files;
pub mod lifetime;
pub mod network;
pub mod observe;
pub mod router;
pub mod sandboxes;
pub mod shapes;
pub mod system;
pub mod terminal;
