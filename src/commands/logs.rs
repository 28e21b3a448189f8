//! `forkd logs`: the console of a child, or what the machine of a snapshot printed.

use crate::cli::LogsArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use forkd_engine::fork::children::{self, ChildrenError};
use serde::Serialize;
use std::io::{self, Read, Write};
use std::process::ExitCode;

/// What `forkd logs --json` prints: of a child its id, of a snapshot its tag.
#[derive(Debug, Serialize)]
struct Logged<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tag: Option<&'a str>,
    console: String,
}

/// `forkd logs`.
pub fn run(args: &LogsArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let (id, tag) = (args.id.as_deref(), args.tag.as_deref());
    let name = id.or(tag).unwrap_or_default();
    let failed = |source| ChildrenError::Console { id: name.to_owned(), source };
    let mut console = match tag {
        Some(tag) => children::console_of_snapshot(&paths, tag)?,
        None => children::console(&paths, name)?,
    };
    if output.is_json() {
        let mut bytes = Vec::new();
        console.read_to_end(&mut bytes).map_err(failed)?;
        let console = String::from_utf8_lossy(&bytes).into_owned();
        output.report(&Logged { id, tag, console }, |_| String::new());
    } else {
        let mut stdout = io::stdout().lock();
        io::copy(&mut console, &mut stdout).and_then(|_| stdout.flush()).map_err(failed)?;
    }
    Ok(ExitCode::SUCCESS)
}
