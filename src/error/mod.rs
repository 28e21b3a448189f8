//! Every command's failure in one table: exit code, the line that says what failed on what and why, and a hint.
//!
//! `CommandError` has one variant per error type a command can end with; `describe` is the exhaustive table over
//! them. A new command adds its variant and its row; nothing else prints errors.

use std::borrow::Cow;
use std::io::Write;
use std::process::ExitCode;

use serde::Serialize;

mod machine;
mod packs;

use crate::failure::CommandError;
use crate::output::Output;
use forkd_engine::build::kernel::KernelError;
use forkd_engine::build::recipe::RecipeError;
use forkd_engine::chain::{causes, chain, plain};
use forkd_engine::local::paths::PathsError;

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
    /// The last lines of a machine's console, as its guest wrote them; empty without.
    console: String,
    /// What the user can do.
    hint: Option<Cow<'static, str>>,
}

impl Row {
    fn failed(what: &'static str, on: impl Into<String>) -> Row {
        Row { exit: FAILED, what, on: on.into(), console: String::new(), hint: None }
    }

    fn usage(what: &'static str, on: impl Into<String>) -> Row {
        Row { exit: USAGE, ..Row::failed(what, on) }
    }

    fn console(mut self, lines: &str) -> Row {
        self.console = lines.to_owned();
        self
    }

    fn hint(mut self, hint: impl Into<Cow<'static, str>>) -> Row {
        self.hint = Some(hint.into());
        self
    }
}

/// What to do when processes cannot be started.
const LIMITS: &str = "check the limits on processes and memory (ulimit -u, ulimit -v)";

/// The table.
fn describe(error: &CommandError) -> Row {
    match error {
        CommandError::Paths(error) => describe_paths(error),
        CommandError::Kernel(error) => describe_kernel(error),
        CommandError::Children(error) => machine::children(error),
        CommandError::RunDir(error) => machine::run_dir(error),
        CommandError::Build(error) => machine::build(error),
        CommandError::Fork(error) => machine::fork(error),
        CommandError::Warm(error) => machine::warm(error),
        CommandError::Snapshot(error) => packs::snapshot(error),
        CommandError::Reference(error) => packs::reference(error),
        CommandError::Registry(error) => packs::registry(error),
        CommandError::Inspect(error) => packs::inspect(error),
        CommandError::Environment { .. } => Row::usage("run the command", ""),
        CommandError::Serve(error) => packs::serve(error),
        CommandError::Publish(error) => packs::publish(error),
        CommandError::Pack(error) => packs::pack(error),
        CommandError::Unpack(error) => packs::unpack(error),
        CommandError::Pull(error) => packs::pull(error),
        CommandError::Repack(error) => packs::repack(error),
        CommandError::Trace(error) => machine::trace(error),
        CommandError::Picture(_) => machine::picture(),
        CommandError::Mount(error) => packs::mount(error),
        CommandError::Mounts(error) => packs::mounts(error),
        CommandError::MountDaemon { .. } => Row::failed("mount the hub", ""),
        CommandError::Cleanup(error) => machine::cleanup(error),
        CommandError::Signals(_) => Row::failed("wait for signals", ""),
        CommandError::Zygote(_) => Row::failed("fork", "").hint(LIMITS),
        CommandError::Variables(_) => Row::usage("give the children their environment", ""),
        CommandError::Detach { what, .. } => Row::failed(what, "").hint(LIMITS),
        CommandError::Runtime(_) => threads(),
    }
}

fn threads() -> Row {
    Row::failed("start", "threads").hint("check the process and thread limits (ulimit -u)")
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

fn describe_recipe(error: &RecipeError) -> Row {
    let row = Row::failed("build the root disk", "");
    match error {
        RecipeError::NotARecipe { .. } => {
            Row::usage("read the recipe", "").hint("give a folder with a recipe.toml, such as recipes/python-numpy")
        }
        RecipeError::Syntax { .. } | RecipeError::Invalid { .. } => {
            Row::usage("read the recipe", "").hint("recipes/python-numpy/recipe.toml is an example of every key")
        }
        RecipeError::NotRoot => row.hint("run it with sudo, or give a root disk to `forkd snapshot --rootfs`"),
        RecipeError::Missing { packages } => row.hint(format!("as root: apt-get install {}", packages.join(" "))),
        RecipeError::NoAgent { .. } | RecipeError::BadAgent { .. } => row.hint(
            "build it with `make agent` (a static program for x86_64-unknown-linux-gnu), or name one in FORKD_AGENT",
        ),
        RecipeError::Tool { .. } | RecipeError::File { .. } => row,
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

/// What the last lines of a console are introduced by.
const LAST_WORDS: &str = "the machine's console ended with";

impl Row {
    /// For people. What programs and guests have printed is indented: it is not to look like what forkd says.
    fn text(&self, why: &str) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_engine::build::machine::BuildError;
    use forkd_engine::build::snapshot::SnapshotBuildError;

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
