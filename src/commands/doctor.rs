//! `forkd doctor`: what this machine has of what forkd needs, and how to mend what it lacks.

use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use forkd_engine::doctor::{self, Check, Verdict};
use std::process::ExitCode;

/// Runs the command; exits with 1 when a check fails.
pub fn run(output: &Output) -> Result<ExitCode, CommandError> {
    let checks = doctor::checks(&environment::paths()?);
    let failed = checks.iter().any(|check| check.verdict == Verdict::Fail);
    output.report(&checks, |checks| {
        let row = |check: &Check| {
            let verdict = match check.verdict {
                Verdict::Pass => "pass",
                Verdict::Warn => "warn",
                Verdict::Fail => "FAIL",
            };
            let mend = check.mend.as_ref().map(|mend| format!("; {mend}")).unwrap_or_default();
            vec![verdict.to_owned(), check.name.to_owned(), format!("{}{mend}", check.found)]
        };
        table(&checks.iter().map(row).collect::<Vec<_>>())
    });
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
