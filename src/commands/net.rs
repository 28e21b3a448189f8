//! `forkd net`: what a child sent, received and was refused.

use crate::cli::NetworkArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::units::{show_since, show_size};
use forkd_engine::fork::children;
use forkd_engine::network::rule::Rule;
use forkd_engine::network::wire::GatewayStatus;
use std::fmt::Write;
use std::process::ExitCode;

/// `forkd net`.
pub fn run(args: &NetworkArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let status = children::gateway(&environment::paths()?, &args.id)?;
    output.report(&status, text);
    Ok(ExitCode::SUCCESS)
}

fn text(status: &GatewayStatus) -> String {
    let counts = status.network.traffic.unwrap_or_default();
    let rules = |rules: &[Rule]| rules.iter().map(Rule::to_string).collect::<Vec<_>>().join(" ");
    let policy = &status.options.policy;
    let allowed = if policy.allow.is_empty() { "public".to_owned() } else { rules(&policy.allow) };
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<12}{value}");
    };
    line("address", format!("{} ({})", status.network.address, status.network.mac));
    line("allowed", allowed);
    if !policy.deny.is_empty() {
        line("denied", rules(&policy.deny));
    }
    if let Some(rate) = status.options.rate {
        line("rate", rate.to_string());
    }
    line("sent", format!("{} in {} packets", show_size(counts.bytes_sent), counts.packets_sent));
    line("received", format!("{} in {} packets", show_size(counts.bytes_received), counts.packets_received));
    line("connections", format!("{}, {} of them open", counts.connections, counts.open));
    line("names", format!("{} asked for", counts.questions));
    line("refused", format!("{}; {} frames dropped", counts.refused, counts.dropped));
    if !status.refusals.is_empty() {
        let mut rows = vec![["REFUSED", "TIMES", "LAST", "WHY"].map(str::to_owned).to_vec()];
        rows.extend(status.refusals.iter().map(|refused| {
            vec![
                refused.what.clone(),
                refused.count.to_string(),
                show_since(refused.last_unix),
                refused.why.text().to_owned(),
            ]
        }));
        text.push('\n');
        text.push_str(&table(&rows));
    }
    text
}
