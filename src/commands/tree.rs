//! `forkd tree`: what comes from what.

use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::units::show_size;
use forkd_engine::fork::tree::{NodeKind, TreeNode, tree};
use serde::Serialize;
use std::process::ExitCode;

#[derive(Serialize)]
struct Report {
    roots: Vec<TreeNode>,
}

/// Draws.
pub fn run(output: &Output) -> Result<ExitCode, CommandError> {
    let roots = tree(&environment::paths()?)?;
    output.report(&Report { roots }, show);
    Ok(ExitCode::SUCCESS)
}

fn show(report: &Report) -> String {
    if report.roots.is_empty() {
        return "nothing runs, and no snapshot is of a child; `forkd snapshots` lists the others".to_owned();
    }
    let mut rows = Vec::new();
    for root in &report.roots {
        rows.push(vec![root.name.clone(), what(root)]);
        draw(&root.children, "", &mut rows);
    }
    table(&rows)
}

/// Adds a row for each of `nodes`, which hang below something at the place that `indent` leads to.
fn draw(nodes: &[TreeNode], indent: &str, rows: &mut Vec<Vec<String>>) {
    for (at, node) in (1..).zip(nodes) {
        let (branch, below) = if at == nodes.len() { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        rows.push(vec![format!("{indent}{branch}{}", node.name), what(node)]);
        draw(&node.children, &format!("{indent}{below}"), rows);
    }
}

fn what(node: &TreeNode) -> String {
    match (node.kind, node.disk_bytes) {
        (NodeKind::Pack, _) => "pack".to_owned(),
        (NodeKind::Fork, _) => "fork".to_owned(),
        (NodeKind::Snapshot, bytes) => format!("snapshot, {}", show_size(bytes.unwrap_or_default())),
        (NodeKind::Child, _) => node.state.map_or("over", |state| state.name()).to_owned(),
    }
}
