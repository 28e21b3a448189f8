//! Why there is no guest kernel.

use std::io;
use std::path::PathBuf;

use crate::build::tools::ToolError;

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Nothing has been built from this configuration yet.
    #[error("no kernel has been built in {}", directory.display())]
    NotBuilt {
        /// Where it would be.
        directory: PathBuf,
    },
    /// Programs or packages the build needs are absent, and we may not install them.
    #[error("the build needs packages that are not installed: {}", packages.join(" "))]
    Missing {
        /// Debian's names for them.
        packages: Vec<String>,
    },
    /// There is no kernel source.
    #[error("no kernel source package is installed in {}", directory.display())]
    NoSource {
        /// Where the distribution puts it.
        directory: PathBuf,
    },
    /// The directory given is no kernel source.
    #[error("{} is not an unpacked kernel source tree", path.display())]
    NotASource {
        /// The directory.
        path: PathBuf,
    },
    /// Too little room for the build.
    #[error("building needs {} MB in {}, {} MB are free", needed / 1_000_000, directory.display(), free / 1_000_000)]
    Space {
        /// The directory for the build.
        directory: PathBuf,
        /// Bytes free there.
        free: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// The source does not know an option that machines need.
    #[error("this kernel source cannot be configured with {}", options.join(" "))]
    Options {
        /// The options that did not survive.
        options: Vec<String>,
    },
    /// A program failed.
    #[error("{step}")]
    Tool {
        /// What was being done.
        step: &'static str,
        /// The program's failure.
        #[source]
        source: ToolError,
    },
    /// A program failed and its whole output was kept.
    #[error("{step}; the whole output is in {}", log.display())]
    Build {
        /// What was being done.
        step: &'static str,
        /// The program's failure.
        #[source]
        source: ToolError,
        /// Its output.
        log: PathBuf,
    },
    /// A file of the build or the cache.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}
