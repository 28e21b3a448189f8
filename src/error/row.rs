//! One row of the table, how it is printed, and rows that several errors lead to.

use std::borrow::Cow;

use forkd_engine::chain::plain;
use forkd_engine::local::paths::PathsError;
use forkd_engine::local::run_dir::RunDirError;

/// Exit code for a command line that makes no sense (clap's own is the same).
pub(super) const USAGE: u8 = 2;
/// Exit code for a command that took too long, as timeout(1) has it.
pub(super) const TIMED_OUT: u8 = 124;
/// Exit code for everything else that failed.
const FAILED: u8 = 1;

/// One row: how an error is shown.
pub(super) struct Row {
    pub(super) exit: u8,
    /// What forkd was doing: "mount", "read the registry".
    pub(super) what: &'static str,
    /// To what: a path, a name, a URL; empty when the cause names it.
    pub(super) on: String,
    /// The last lines of a machine's console, as its guest wrote them; empty without.
    pub(super) console: String,
    /// What the user can do.
    pub(super) hint: Option<Cow<'static, str>>,
}

impl Row {
    pub(super) fn failed(what: &'static str, on: impl Into<String>) -> Row {
        Row { exit: FAILED, what, on: on.into(), console: String::new(), hint: None }
    }

    pub(super) fn usage(what: &'static str, on: impl Into<String>) -> Row {
        Row { exit: USAGE, ..Row::failed(what, on) }
    }

    pub(super) fn console(mut self, lines: &str) -> Row {
        self.console = lines.to_owned();
        self
    }

    pub(super) fn hint(mut self, hint: impl Into<Cow<'static, str>>) -> Row {
        self.hint = Some(hint.into());
        self
    }
}

/// What the last lines of a console are introduced by.
pub(super) const LAST_WORDS: &str = "the machine's console ended with";

impl Row {
    /// For people. What programs and guests have printed is indented: it is not to look like what forkd says.
    pub(super) fn text(&self, why: &str) -> String {
        let mut text = format!("forkd: cannot {}", self.what);
        for part in [self.on.as_str(), why] {
            if !part.is_empty() {
                text.push_str(": ");
                text.push_str(&lines(part));
            }
        }
        text.push('\n');
        if !self.console.is_empty() {
            text.push_str(&format!("{LAST_WORDS}:\n    {}\n", lines(&self.console)));
        }
        if let Some(hint) = &self.hint {
            text.push_str(&format!("hint: {hint}\n"));
        }
        text
    }
}

/// Without control characters but line breaks, lines behind the first indented.
fn lines(text: &str) -> String {
    text.lines().map(plain).collect::<Vec<_>>().join("\n    ")
}

/// What to do when processes cannot be started.
pub(super) const LIMITS: &str = "check the limits on processes and memory (ulimit -u, ulimit -v)";

/// Threads cannot be started.
pub(super) fn threads() -> Row {
    Row::failed("start", "threads").hint("check the process and thread limits (ulimit -u)")
}

/// A directory of forkd's own.
pub(super) fn paths(error: &PathsError) -> Row {
    match error {
        PathsError::NoHome { variable } => Row::failed("find forkd's directories", "")
            .hint(format!("set HOME or {variable} to an absolute path")),
        PathsError::Directory { .. } => Row::failed("use a directory of forkd's", "")
            .hint("set XDG_DATA_HOME, XDG_CACHE_HOME or XDG_RUNTIME_DIR to a place you can write"),
        PathsError::Foreign { .. } => {
            Row::failed("use the run directory", "").hint("set XDG_RUNTIME_DIR to a directory of your own")
        }
        PathsError::Tag { .. } => Row::usage("name a snapshot", ""),
    }
}

/// A picture cannot be written.
pub(super) fn picture() -> Row {
    Row::failed("draw the picture", "").hint("name a file in a directory that exists and can be written to")
}

/// A run directory.
pub(super) fn run_dir(error: &RunDirError) -> Row {
    let row = Row::failed("look at running children", "");
    match error {
        RunDirError::Paths(error) => paths(error),
        RunDirError::UnknownFork { .. } => {
            Row::failed("find the fork", "").hint("`forkd ps` lists those that run")
        }
        RunDirError::OtherVersion { .. } => {
            row.hint("ask it with the forkd that started it; `forkd kill` ends it")
        }
        RunDirError::UnknownChild { .. } => {
            Row::failed("find the child", "").hint("`forkd ps` lists those that run")
        }
        RunDirError::Dead { .. } => row.hint("`forkd cleanup` removes what it left"),
        RunDirError::Refused { .. } => Row::failed("branch the child", ""),
        RunDirError::File { .. } | RunDirError::Malformed { .. } | RunDirError::Cgroup(_) => row,
    }
}
