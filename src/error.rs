//! Every command's failure in one table: exit code, the line that says what failed on what and why, and a hint.
//!
//! `CommandError` has one variant per error type a command can end with; [`describe`] is the exhaustive table over
//! them. A new command adds its variant and its row; nothing else prints errors.

use std::borrow::Cow;
use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use serde::Serialize;

use crate::kernel::KernelError;
use crate::output::Output;
use crate::paths::PathsError;

/// What a command can fail with.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The verb is known but this build has no implementation of it.
    #[error("this build of forkd cannot do it yet")]
    NotBuilt(&'static str),
    /// A directory of forkd's own.
    #[error(transparent)]
    Paths(#[from] PathsError),
    /// The guest kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The async runtime could not be started.
    #[error("the async runtime does not start")]
    Runtime(#[source] std::io::Error),
}

/// Exit code for a command line that makes no sense (clap's own is the same).
const USAGE: u8 = 2;
/// Exit code for everything else that failed.
const FAILED: u8 = 1;

/// One row: how an error is shown.
struct Row {
    exit: u8,
    /// What forkd was doing: "mount", "read the registry".
    what: &'static str,
    /// To what: a path, a name, a URL; empty when the cause names it.
    on: String,
    /// What the user can do.
    hint: Option<Cow<'static, str>>,
}

impl Row {
    fn failed(what: &'static str, on: impl Into<String>) -> Row {
        Row { exit: FAILED, what, on: on.into(), hint: None }
    }

    fn usage(what: &'static str, on: impl Into<String>) -> Row {
        Row { exit: USAGE, ..Row::failed(what, on) }
    }

    fn hint(mut self, hint: impl Into<Cow<'static, str>>) -> Row {
        self.hint = Some(hint.into());
        self
    }
}

/// The table.
fn describe(error: &CommandError) -> Row {
    match error {
        CommandError::NotBuilt(verb) => Row::failed("run", *verb),
        CommandError::Paths(error) => describe_paths(error),
        CommandError::Kernel(error) => describe_kernel(error),
        CommandError::Runtime(_) => {
            Row::failed("start", "threads").hint("check the process and thread limits (ulimit -u)")
        }
    }
}

fn describe_paths(error: &PathsError) -> Row {
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

fn describe_kernel(error: &KernelError) -> Row {
    let row = Row::failed("provide a guest kernel", "");
    match error {
        KernelError::NotBuilt { .. } => {
            row.hint("run `forkd kernel build` (about 5 minutes), or give one with --kernel FILE")
        }
        KernelError::Missing { packages } => {
            row.hint(format!("as root: apt-get install {}", packages.join(" ")))
        }
        KernelError::NoSource { .. } => {
            row.hint("as root: apt-get install linux-source-6.12, or give a source tree with --source DIR")
        }
        KernelError::NotASource { .. } => Row::usage("provide a guest kernel", "")
            .hint("give the top of an unpacked kernel source: it has Makefile, Kconfig and arch/"),
        KernelError::Space { .. } => row.hint("free some space, or set XDG_CACHE_HOME to a larger disk"),
        KernelError::Options { .. } => row.hint("use the source of Linux 6.12 or later"),
        KernelError::Tool { .. } | KernelError::Build { .. } | KernelError::File { .. } => row,
    }
}

/// What `--json` prints for a failure.
#[derive(Serialize)]
struct JsonFailure<'a> {
    error: JsonError<'a>,
}

#[derive(Serialize)]
struct JsonError<'a> {
    what: &'a str,
    on: &'a str,
    why: String,
    hint: Option<&'a str>,
}

/// Prints `forkd: WHAT: ON: WHY` and `hint: ...` on stderr (with `--json` also as the document on stdout) and
/// returns the exit code.
pub fn report(error: &CommandError, output: &Output) -> ExitCode {
    let row = describe(error);
    let why = chain(error);
    if output.is_json() {
        let error = JsonError { what: row.what, on: &row.on, why: why.clone(), hint: row.hint.as_deref() };
        output.report(&JsonFailure { error }, |_| String::new());
    }
    let mut line = format!("forkd: cannot {}", row.what);
    for part in [row.on.as_str(), why.as_str()] {
        if !part.is_empty() {
            line.push_str(": ");
            line.push_str(part);
        }
    }
    line.push('\n');
    if let Some(hint) = &row.hint {
        line.push_str(&format!("hint: {hint}\n"));
    }
    let _ = std::io::stderr().write_all(line.as_bytes());
    ExitCode::from(row.exit)
}

/// The error and its causes, outermost first, leaving out a cause whose text the one before already ends with.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    // Causes can quote what a server sent: keep the terminal's control characters out.
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_chained_once_and_control_characters_dropped() {
        let source = std::io::Error::other("disk\x1b[31m on fire");
        let error = CommandError::from(PathsError::Directory { path: "/x".into(), source });
        assert_eq!(chain(&error), "/x: disk [31m on fire");
    }

    #[test]
    fn a_bad_tag_is_a_usage_error() {
        let error = CommandError::from(PathsError::Tag { tag: "a/b".into() });
        assert_eq!(describe(&error).exit, USAGE);
    }
}
