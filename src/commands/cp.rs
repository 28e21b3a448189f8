//! `forkd cp`: files into a child and out of it.

use crate::cli::CpArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::interrupt;
use crate::output::Output;
use crate::units::show_size;
use forkd_engine::chain::plain;
use forkd_engine::fork::children::connect;
use forkd_engine::fork::copy::{self, Copied, CopyError};
use serde::Serialize;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

/// Standard input or output, instead of a path.
const STREAM: &str = "-";

/// What `forkd cp` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    id: &'a str,
    from: &'a str,
    to: &'a str,
    seconds: f64,
    #[serde(flatten)]
    copied: Copied,
}

/// `forkd cp`.
pub fn run(args: &CpArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let (from, to) = (args.from.as_str(), args.to.as_str());
    let usage = |why| Err(CommandError::CopyUsage { why });
    let (id, path) = match (in_child(from), in_child(to)) {
        (Some(inside), None) | (None, Some(inside)) => inside,
        (Some(_), Some(_)) => return usage("both sides are in children"),
        (None, None) => return usage("neither side is in a child"),
    };
    if !path.starts_with('/') {
        return usage("paths in a child are absolute");
    }
    let outward = in_child(from).is_some();
    if outward && to == STREAM && (output.is_json() || io::stdout().is_terminal()) {
        return usage("the archive does not go with --json or to a terminal");
    }
    let client = connect(&environment::paths()?, id)?;
    let interrupt = interrupt::watch();
    let started = Instant::now();
    let copied = match (outward, if outward { to } else { from }) {
        (true, STREAM) => copy::out_as_archive(client, path, args.follow_link, &mut io::stdout(), &interrupt),
        (true, here) => copy::out(client, path, args.follow_link, Path::new(here), &interrupt, output),
        (false, STREAM) => copy::into_from_archive(client, &mut io::stdin(), path, args.archive, &interrupt),
        (false, here) => {
            let here = Path::new(here);
            copy::into(client, here, args.follow_link, path, args.archive, &interrupt, output)
        }
    };
    let copied = match copied {
        Err(CopyError::Interrupted) => return Ok(ExitCode::from(interrupt.exit_status().unwrap_or(1))),
        copied => copied?,
    };
    for line in &copied.left_out {
        output.note(format_args!("left out: {}", plain(line)));
    }
    if to == STREAM {
        return Ok(ExitCode::SUCCESS);
    }
    let seconds = started.elapsed().as_secs_f64();
    output.report(&Report { id, from, to, seconds, copied }, |report| {
        let Copied { entries, bytes, .. } = report.copied;
        match from {
            STREAM => format!("copied an archive of {}", show_size(bytes)),
            _ => format!(
                "copied {entries} {}, {}",
                if entries == 1 { "file" } else { "files" },
                show_size(bytes)
            ),
        }
    });
    Ok(ExitCode::SUCCESS)
}

/// The child and the path in it that `text` names; `None` for a path of this host, such as `./a:b`.
fn in_child(text: &str) -> Option<(&str, &str)> {
    text.split_once(':').filter(|(id, _)| !id.is_empty() && !id.contains('/') && !id.starts_with('.'))
}
