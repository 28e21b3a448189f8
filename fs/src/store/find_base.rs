//! What an opened delta asks of whoever knows where packs are.

use std::fmt::Debug;
use std::pin::Pin;

use super::location::PackLocation;
use crate::index::BasePack;

/// Where packs may be, for whoever opens a delta.
pub trait FindBase: Debug + Send + Sync {
    /// Places where `base` may be, the best first. One on the web that says in [`PackLocation::index`] which pack it
    /// is, as a registry does, is believed until a frame is wrong.
    fn find<'a>(&'a self, base: &'a BasePack) -> Places<'a>;
}

/// What [`FindBase::find`] comes to.
pub type Places<'a> = Pin<Box<dyn Future<Output = Vec<PackLocation>> + Send + 'a>>;
