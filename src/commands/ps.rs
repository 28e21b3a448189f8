//! `forkd ps`: the children that run. They are found through their forks' run directories; no daemon is involved.

use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::units::show_size;
use forkd_engine::fork::children::{self, ChildrenError, RunningFork};
use forkd_engine::local::run_dir::PublishedPort;
use std::process::ExitCode;
use std::time::Duration;

/// `9000->8000`: of the host's loopback to the child's.
fn show_ports(ports: &[PublishedPort]) -> String {
    let shown = ports.iter().map(|port| format!("{}->{}", port.local, port.guest));
    shown.collect::<Vec<_>>().join(", ")
}

/// Whole seconds of what is left of a time.
fn show_left(milliseconds: u64) -> String {
    humantime::format_duration(Duration::from_secs(milliseconds.div_ceil(1000))).to_string()
}

/// `forkd ps`.
pub fn run(output: &Output) -> Result<ExitCode, CommandError> {
    let forks = children::list(&environment::paths()?).map_err(ChildrenError::from)?;
    output.report(&forks, |forks| {
        let mut rows = vec![["CHILD", ">PID", "STATE", ">FETCHED", "PACK"].map(str::to_owned).to_vec()];
        let has_ports = |fork: &RunningFork| fork.status.children.iter().any(|child| !child.ports.is_empty());
        let ports = forks.iter().any(has_ports);
        let is_branch = |fork: &RunningFork| fork.status.children.iter().any(|child| child.parent.is_some());
        let branches = forks.iter().any(is_branch);
        rows[0].extend(branches.then(|| "BRANCH OF".to_owned()));
        rows[0].extend(ports.then(|| "PORTS".to_owned()));
        for RunningFork { status, .. } in forks {
            let fetched = match status.bytes_total {
                0 => "local".to_owned(),
                total => format!("{} of {}", show_size(status.bytes_fetched), show_size(total)),
            };
            for child in &status.children {
                let error = child.error.as_ref().map(|error| format!(" ({error})")).unwrap_or_default();
                let left =
                    child.expires_in_ms.map(|left| format!(", {} left", show_left(left))).unwrap_or_default();
                let place = if child.on_disk { " to disk" } else { "" };
                let state = format!("{}{place}{left}{error}", child.state.name());
                let mut row = vec![
                    child.id.clone(),
                    child.pid.to_string(),
                    state,
                    fetched.clone(),
                    status.pack.clone(),
                ];
                row.extend(branches.then(|| child.parent.clone().unwrap_or_else(|| "-".to_owned())));
                row.extend(ports.then(|| show_ports(&child.ports)));
                rows.push(row);
            }
        }
        table(&rows)
    });
    Ok(ExitCode::SUCCESS)
}
