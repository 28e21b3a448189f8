//! Pictures of a fork and of a pack, as SVG.

pub mod heatmap;
pub mod sizes;
pub mod svg;
pub mod timeline;
