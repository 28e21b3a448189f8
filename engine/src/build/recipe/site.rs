//! Where a root disk is being built: its directory, the programs that work on it, and who hears of it.

use std::path::{Path, PathBuf};

use crate::build::tools::Tool;
use crate::chain::plain;
use crate::interrupt::Interrupt;
use crate::local::work_dir::WorkDir;

/// A build in progress.
pub(super) struct Site<'a> {
    work: &'a WorkDir,
    interrupt: &'a Interrupt,
    say: &'a dyn Fn(&str),
}

impl<'a> Site<'a> {
    pub(super) fn new(work: &'a WorkDir, interrupt: &'a Interrupt, say: &'a dyn Fn(&str)) -> Self {
        Self { work, interrupt, say }
    }

    /// A place in the work directory, which ends with the build.
    pub(super) fn place(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    /// The directory that becomes the root disk.
    pub(super) fn tree(&self) -> PathBuf {
        self.place("tree")
    }

    /// Tells what is being done, or what a program says. Programs of a recipe may say anything.
    pub(super) fn say(&self, text: &str) {
        (self.say)(&plain(text));
    }

    /// A program whose temporary files end with the work directory.
    pub(super) fn tool(&self, name: &str) -> Tool<'_> {
        Tool::new(name, self.interrupt).env("TMPDIR", self.work.path())
    }

    /// A program that starts others, or mounts, which ends with all of that.
    pub(super) fn isolated(&self, name: &str) -> Tool<'_> {
        Tool::isolated(name, self.interrupt).env("TMPDIR", self.work.path())
    }

    /// tar over a directory with everything that a file has.
    pub(super) fn tar(&self, mode: &str, archive: &Path, directory: &Path) -> Tool<'_> {
        let tar = self.tool("tar").arg(mode).args(["--numeric-owner", "--xattrs", "--xattrs-include=*"]);
        tar.arg("--file").arg(archive).arg("--directory").arg(directory)
    }
}
