//! The distribution's part of a root disk: a Debian tree by mmdebstrap, without traces of who built it.

use std::fs;
use std::path::Path;

use super::apt_sources::AptSources;
use super::error::RecipeError;
use super::site::Site;
use super::tree::RootDiskTree;

/// Files no program in a machine misses.
const EXCLUDED: [&str; 8] = [
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/i18n/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/bash-completion/*",
];
/// Traces of the building machine and of the build: names, mirrors (which may carry passwords), logs, caches.
const REMOVED: [&str; 9] = [
    "/etc/hostname",
    "/etc/machine-id",
    "/etc/resolv.conf",
    "/etc/apt/sources.list",
    "/etc/apt/apt.conf.d/99mmdebstrap",
    "/etc/dpkg/dpkg.cfg.d/99mmdebstrap",
    "/var/cache/ldconfig/aux-cache",
    "/var/lib/dpkg/status-old",
    "/var/lib/dpkg/available-old",
];
const CLEARED: [&str; 6] = [
    "/etc/apt/sources.list.d",
    "/var/log",
    "/var/cache/apt",
    "/var/cache/debconf",
    "/var/lib/apt/lists",
    "/tmp",
];

/// Makes the tree from this machine's sources for the release.
pub(super) fn install(
    site: &Site<'_>,
    suite: &str,
    packages: &[&str],
    sources: &AptSources,
) -> Result<RootDiskTree, RecipeError> {
    site.say("installing the distribution");
    // It starts programs of the distribution, and mounts.
    let mut tool = site
        .isolated("mmdebstrap")
        .args(["--mode=root", "--variant=essential", "--format=directory"])
        // Without it usrmerge does the work, and brings all of Perl.
        .arg("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr")
        .args(EXCLUDED.map(|rule| format!("--dpkgopt={rule}")));
    if !packages.is_empty() {
        tool = tool.arg(format!("--include={}", packages.join(",")));
    }
    tool = tool.arg(suite).arg(site.tree());
    for (name, text) in [("forkd.list", &sources.lines), ("forkd.sources", &sources.stanzas)] {
        if !text.is_empty() {
            let path = site.place(name);
            fs::write(&path, text).map_err(RecipeError::file(&path))?;
            tool = tool.arg(path);
        }
    }
    let result = tool.run(|line| {
        if line.starts_with("I: ") || line.starts_with("Unpacking ") || line.starts_with("Setting up ") {
            site.say(line.trim_start_matches("I: "));
        }
    });
    result.map_err(RecipeError::tool("installing the distribution"))?;
    let tree = RootDiskTree::open(&site.tree()).map_err(RecipeError::file(&site.tree()))?;
    for file in REMOVED {
        tree.remove(Path::new(file)).map_err(RecipeError::file(Path::new(file)))?;
    }
    for directory in CLEARED {
        tree.clear(Path::new(directory)).map_err(RecipeError::file(Path::new(directory)))?;
    }
    Ok(tree)
}
