//! `forkd eval`: has the warm worker of a child evaluate code.

use crate::cli::EvalArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use forkd_abi::protocol::Answer;
use forkd_engine::fork::children;
use serde::Serialize;
use std::process::ExitCode;

#[derive(Debug, Serialize)]
struct Evaluated<'a> {
    id: &'a str,
    #[serde(flatten)]
    answer: Answer,
}

/// `forkd eval`.
pub fn run(args: &EvalArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let id = &args.id;
    let answer = children::eval(&environment::paths()?, id, &args.code)?;
    output.report(&Evaluated { id, answer }, |evaluated| {
        let Answer { answer, output, .. } = &evaluated.answer;
        let mut text = output.clone().unwrap_or_default();
        if let Some(answer) = answer {
            text.push_str(answer);
            text.push('\n');
        }
        text
    });
    Ok(ExitCode::SUCCESS)
}
