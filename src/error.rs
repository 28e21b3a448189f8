//! Every command's failure in one table: exit code, the line that says what failed on what and why, and a hint.
//!
//! `CommandError` has one variant per error type a command can end with; `describe` is the exhaustive table over
//! them. A new command adds its variant and its row; nothing else prints errors.

use std::borrow::Cow;
use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use forkd_fs::store::{OpenError, ReadError};
use serde::Serialize;

mod machine;
mod packs;

use crate::commands::build::BuildCommandError;
use crate::commands::children::ChildrenError;
use crate::commands::fork::ForkCommandError;
use crate::commands::mount::MountCommandError;
use crate::commands::pack::PackError;
use crate::commands::pull::PullError;
use crate::commands::repack::RepackError;
use crate::commands::trace::TraceCommandError;
use crate::commands::unpack::UnpackCommandError;
use crate::commands::warm::WarmCommandError;
use crate::hub::publish::PublishError;
use crate::hub::serve::ServeError;
use crate::kernel::KernelError;
use crate::output::Output;
use crate::paths::PathsError;
use crate::picture::PictureError;
use crate::recipe::RecipeError;
use crate::registry::{InvalidReference, RegistryError};
use crate::run_dir::RunDirError;
use crate::snapshot::SnapshotError;

/// What a command can fail with.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// A directory of forkd's own.
    #[error(transparent)]
    Paths(#[from] PathsError),
    /// The guest kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Children that run.
    #[error(transparent)]
    Children(#[from] ChildrenError),
    /// Run directories.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// Building a snapshot.
    #[error(transparent)]
    Build(Box<BuildCommandError>),
    /// Starting children.
    #[error(transparent)]
    Fork(Box<ForkCommandError>),
    /// A local snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A text that names no package.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    /// The hub's registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A pack that cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A pack that cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// `forkd hub serve`.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// `forkd hub publish`.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// `forkd pack`.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// `forkd unpack`, and the second half of `forkd pull`.
    #[error(transparent)]
    Unpack(#[from] UnpackCommandError),
    /// `forkd pull`.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// `forkd repack`.
    #[error(transparent)]
    Repack(#[from] RepackError),
    /// `forkd trace`.
    #[error(transparent)]
    Trace(Box<TraceCommandError>),
    /// A picture.
    #[error(transparent)]
    Picture(#[from] PictureError),
    /// `forkd mount` and `forkd umount`.
    #[error(transparent)]
    Mount(#[from] MountCommandError),
    /// `forkd warm`.
    #[error(transparent)]
    Warm(Box<WarmCommandError>),
    /// The async runtime could not be started.
    #[error("the async runtime does not start")]
    Runtime(#[source] std::io::Error),
}

// Boxed, so that results without these rare, large errors stay small.
impl From<ForkCommandError> for CommandError {
    fn from(error: ForkCommandError) -> CommandError {
        CommandError::Fork(Box::new(error))
    }
}

impl From<WarmCommandError> for CommandError {
    fn from(error: WarmCommandError) -> CommandError {
        CommandError::Warm(Box::new(error))
    }
}

impl From<TraceCommandError> for CommandError {
    fn from(error: TraceCommandError) -> CommandError {
        CommandError::Trace(Box::new(error))
    }
}

impl From<BuildCommandError> for CommandError {
    fn from(error: BuildCommandError) -> CommandError {
        CommandError::Build(Box::new(error))
    }
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
        CommandError::Open(error) => packs::open(error),
        CommandError::Read(error) => packs::read(error),
        CommandError::Serve(error) => packs::serve(error),
        CommandError::Publish(error) => packs::publish(error),
        CommandError::Pack(error) => packs::pack(error),
        CommandError::Unpack(error) => packs::unpack(error),
        CommandError::Pull(error) => packs::pull(error),
        CommandError::Repack(error) => packs::repack(error),
        CommandError::Trace(error) => machine::trace(error),
        CommandError::Picture(_) => machine::picture(),
        CommandError::Mount(error) => packs::mount(error),
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
    if output.is_json() {
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

/// The error and its causes on one line, outermost first, leaving out a cause whose text the one before already ends with.
pub fn chain(error: &dyn Error) -> String {
    // Causes can quote what a server sent.
    plain(&causes(error))
}

fn causes(error: &dyn Error) -> String {
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
    text
}

/// Without control characters but line breaks, lines behind the first indented.
fn lines(text: &str) -> String {
    text.lines().map(plain).collect::<Vec<_>>().join("\n    ")
}

/// Without the terminal's control characters.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine_build::BuildError;

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
        let error = CommandError::from(BuildCommandError::Build { tag: "t".into(), source, console });
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
