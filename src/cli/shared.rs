//! Arguments that several commands have.

use clap::Args;
use forkd_fs::cache::CacheOptions;

use crate::units;

/// Which hub to ask.
#[derive(Debug, Clone, Args)]
pub struct HubSource {
    /// The hub: URL (http, https, file) or path of a registry.json or of its folder
    ///
    /// Without it, ./registry.json in the working directory is used when there is one.
    #[arg(long, value_name = "URL", env = "FORKD_HUB_URL")]
    pub hub: Option<String>,
}

/// How much disk the chunk cache may take.
#[derive(Debug, Clone, Args)]
pub struct CacheArgs {
    /// The most the chunk cache may hold on disk
    #[arg(long, value_name = "SIZE", default_value = "10GiB", value_parser = units::parse_size)]
    pub cache_size: u64,
    /// Disk space the cache leaves to others; it shrinks rather than take it [default: 5% of the disk, 1GiB at most]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    pub cache_reserve: Option<u64>,
}

impl CacheArgs {
    /// As the cache takes them.
    pub fn options(&self) -> CacheOptions {
        CacheOptions { max_bytes: self.cache_size, min_free_bytes: self.cache_reserve }
    }
}
