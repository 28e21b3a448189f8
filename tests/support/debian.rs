//! Debian programs that tests run themselves.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::{Path, PathBuf};

/// A program of a package that `make deps` unpacked for the tests, or one that is installed: `nginx`, `dnsmasq`, `psql`,
/// `pgbench`. PostgreSQL's own, not Debian's wrappers in Perl.
pub fn program(name: &str) -> PathBuf {
    let unpacked = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../unpacked");
    let roots = [unpacked, PathBuf::from("/")];
    let folders = ["usr/lib/postgresql/15/bin", "usr/sbin", "usr/bin"];
    let mut all = roots.iter().flat_map(|root| folders.map(|folder| root.join(folder).join(name)));
    all.find(|path| path.exists()).unwrap_or_else(|| panic!("{name} is not there: run `make deps`"))
}
