//! `forkd ps`: the children that run. They are found through their forks' run directories; no daemon is involved.

use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::units::show_size;
use forkd_engine::fork::children::{self, ChildrenError, RunningFork};
use std::process::ExitCode;

/// `forkd ps`.
pub fn run(output: &Output) -> Result<ExitCode, CommandError> {
    let forks = children::list(&environment::paths()?).map_err(ChildrenError::from)?;
    output.report(&forks, |forks| {
        let mut rows = vec![["CHILD", ">PID", "STATE", ">FETCHED", "PACK"].map(str::to_owned).to_vec()];
        for RunningFork { status, .. } in forks {
            let fetched = match status.bytes_total {
                0 => "local".to_owned(),
                total => format!("{} of {}", show_size(status.bytes_fetched), show_size(total)),
            };
            for child in &status.children {
                let error = child.error.as_ref().map(|error| format!(" ({error})")).unwrap_or_default();
                let state = format!("{}{error}", child.state.name());
                rows.push(vec![
                    child.id.clone(),
                    child.pid.to_string(),
                    state,
                    fetched.clone(),
                    status.pack.clone(),
                ]);
            }
        }
        table(&rows)
    });
    Ok(ExitCode::SUCCESS)
}
