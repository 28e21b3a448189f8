//! `forkd branch`: new children that go on from where a running one is.

use super::fork_text::{milliseconds, printable_answer};
use crate::cli::BranchArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::runtime::{end_on_signal, local_runtime};
use crate::units::show_size;
use forkd_engine::fork::ask::ChildRequest;
use forkd_engine::fork::branch::{BranchOutcome, BranchReport, branch};
use forkd_engine::fork::children;
use forkd_engine::fork::supervisor::process_start_ns;
use forkd_engine::local::paths::Paths;
use std::process::ExitCode;
use std::time::Duration;

/// Pause between two looks at whether branches live.
const LOOK: Duration = Duration::from_millis(200);

/// Runs the command.
pub fn run(args: &BranchArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let branching = args.branching(process_start_ns())?;
    let paths = environment::paths()?;
    let report = branch(&paths, &branching, output)?;
    let ids: Vec<_> = report.children.iter().map(|child| child.id.clone()).collect();
    output.report(&report, text);
    if !args.detach {
        if branching.request == ChildRequest::Nothing {
            stay(&paths, &ids, output)?;
        }
        end(&paths, &ids);
    }
    Ok(if report.has_failures() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Until Ctrl-C, or until all are over.
fn stay(paths: &Paths, ids: &[String], output: &Output) -> Result<(), CommandError> {
    let runtime = local_runtime().map_err(CommandError::Runtime)?;
    let (at_signal, branches) = (paths.clone(), ids.to_vec());
    end_on_signal(&runtime, move || end(&at_signal, &branches));
    output.note("branches run until Ctrl-C; `forkd exec ID -- CMD` reaches them");
    runtime.block_on(async {
        while ids.iter().any(|id| children::find(paths, id).is_ok()) {
            tokio::time::sleep(LOOK).await;
        }
    });
    Ok(())
}

fn end(paths: &Paths, ids: &[String]) {
    for id in ids {
        // One that is over already needs no end.
        let _ = children::kill(paths, id);
    }
}

fn text(report: &BranchReport) -> String {
    let headings = ["CHILD", ">FIRST INSTRUCTION", ">READY", ">ANSWERED", "ANSWER"];
    let mut rows = vec![headings.map(str::to_owned).to_vec()];
    rows.extend(report.children.iter().map(row));
    let copied = show_size(report.copied_bytes);
    let parent = &report.parent;
    format!("{}{parent} stood still for {:.1} ms, {copied} copied\n", table(&rows), report.pause_ms)
}

fn row(child: &BranchOutcome) -> Vec<String> {
    vec![
        child.id.clone(),
        milliseconds(child.first_instruction_ms),
        milliseconds(child.ready_ms),
        milliseconds(child.answered_ms),
        printable_answer(child.error.as_deref(), child.exit_code, child.answer.as_deref()),
    ]
}
