//! Every command's failure in one table: exit code, the line that says what failed on what and why, and a hint.
//!
//! `CommandError` has one variant per error type a command can end with; `describe` is the exhaustive table over
//! them. A new command adds its variant and its row; nothing else prints errors.

use std::io::Write;
use std::process::ExitCode;

use serde::Serialize;

mod builds;
mod machine;
mod packs;
mod row;

use row::{LAST_WORDS, LIMITS, Row};

use crate::failure::CommandError;
use crate::output::Output;
use forkd_engine::chain::{causes, chain, plain};

/// The table.
fn describe(error: &CommandError) -> Row {
    match error {
        CommandError::Paths(error) => row::paths(error),
        CommandError::Daemon { .. } => Row::failed("serve", "")
            .hint("the program forkd-daemon has to lie beside forkd: `make build` makes both"),
        CommandError::Kernel(error) => builds::kernel(error),
        CommandError::Children(error) => machine::children(error),
        CommandError::ChildSnapshot(error) => machine::child_snapshot(error),
        CommandError::Forward(error) => machine::forward(error),
        CommandError::RunDir(error) => row::run_dir(error),
        CommandError::Build(error) => builds::build(error),
        CommandError::Fork(error) => machine::fork(error),
        CommandError::Warm(error) => machine::warm(error),
        CommandError::Snapshot(error) => packs::snapshot(error),
        CommandError::Reference(error) => packs::reference(error),
        CommandError::Registry(error) => packs::registry(error),
        CommandError::Inspect(error) => packs::inspect(error),
        CommandError::Diff(error) => packs::diff(error),
        CommandError::Environment { .. } => Row::usage("run the command", ""),
        CommandError::NeedsGateway { .. } => Row::usage("fork", "").hint("add --net nat"),
        CommandError::TimedOut { .. } => {
            Row { exit: row::TIMED_OUT, ..Row::failed("wait for the command", "") }
        }
        CommandError::NoTerminal { .. } => {
            Row::usage("give the command a terminal", "").hint("without `-t` it reads and writes pipes")
        }
        CommandError::Terminal(_) => Row::failed("use the terminal", ""),
        CommandError::Copy(error) => machine::copy(error),
        CommandError::CopyUsage { .. } => Row::usage("copy", "")
            .hint("`forkd cp ID:/path DEST` copies out of a child, `forkd cp SRC ID:/path` into it"),
        CommandError::Serve(error) => packs::serve(error),
        CommandError::Publish(error) => packs::publish(error),
        CommandError::Pack(error) => packs::pack(error),
        CommandError::Unpack(error) => packs::unpack(error),
        CommandError::Pull(error) => packs::pull(error),
        CommandError::Repack(error) => packs::repack(error),
        CommandError::Trace(error) => builds::trace(error),
        CommandError::Picture(_) => row::picture(),
        CommandError::Page(_) => Row::failed("write the page", ""),
        CommandError::Mount(error) => packs::mount(error),
        CommandError::Mounts(error) => packs::mounts(error),
        CommandError::MountDaemon { .. } => Row::failed("mount the hub", ""),
        CommandError::Cleanup(error) => machine::cleanup(error),
        CommandError::Signals(_) => Row::failed("wait for signals", ""),
        CommandError::Zygote(_) => Row::failed("fork", "").hint(LIMITS),
        CommandError::Variables(_) => Row::usage("give the children their environment", ""),
        CommandError::Detach { what, .. } => Row::failed(what, "").hint(LIMITS),
        CommandError::Runtime(_) => row::threads(),
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

/// Prints `forkd: WHAT: ON: WHY`, the last lines of a machine's console and `hint: ...` on stderr (with `--json` also as the
/// document on stdout, where the console is part of WHY) and returns the exit code.
pub fn report(error: &CommandError, output: &Output) -> ExitCode {
    let row = describe(error);
    if output.is_json() && !error.follows_a_report() {
        let console = match row.console.is_empty() {
            true => String::new(),
            false => format!("; {LAST_WORDS}: {}", plain(&row.console)),
        };
        let why = chain(error) + &console;
        let error = JsonError { what: row.what, on: &row.on, why, hint: row.hint.as_deref() };
        output.report(&JsonFailure { error }, |_| String::new());
    }
    let _ = std::io::stderr().write_all(row.text(&causes(error)).as_bytes());
    ExitCode::from(row.exit)
}

#[cfg(test)]
mod tests {
    use super::row::USAGE;
    use super::*;
    use forkd_engine::build::machine::BuildError;
    use forkd_engine::build::snapshot::SnapshotBuildError;
    use forkd_engine::local::paths::PathsError;

    #[test]
    fn causes_are_chained_once_and_control_characters_dropped() {
        const TEXT: &str = "forkd: cannot use a directory of forkd's: a\n    hint: b [m\n\
            hint: set XDG_DATA_HOME, XDG_CACHE_HOME or XDG_RUNTIME_DIR to a place you can write\n";
        let source = std::io::Error::other("disk\x1b[31m on fire");
        let error = CommandError::from(PathsError::Directory { path: "/x".into(), source });
        assert_eq!(chain(&error), "/x: disk [31m on fire");
        assert_eq!(describe(&error).text("a\nhint: b\x1b[m"), TEXT);
    }

    #[test]
    fn a_console_is_shown_line_by_line_and_cannot_pass_for_ours() {
        let console = "first\x1b[2J\nhint: run this\r\u{9b}31m".to_owned();
        let source = BuildError::ScratchWritten;
        let error = CommandError::from(SnapshotBuildError::Build { tag: "t".into(), source, console });
        let text = describe(&error).text("because");
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[..2], ["forkd: cannot build: because", "the machine's console ended with:"]);
        assert_eq!(lines[2..4], ["    first [2J", "    hint: run this  31m"]);
        assert_eq!(lines[4..], ["hint: nothing was kept"]);
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
    }

    #[test]
    fn a_bad_tag_is_a_usage_error() {
        let error = CommandError::from(PathsError::Tag { tag: "a/b".into() });
        assert_eq!(describe(&error).exit, USAGE);
    }
}
