//! `forkd trace`: records the working set of a snapshot or pack again.

use std::process::ExitCode;

use super::build::Caller;
use crate::cli::TraceArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::units::{show_share, show_size};
use forkd_engine::build::trace::{RetraceReport, RetraceRequest, WorkingSetShare, retrace};
use forkd_engine::target::Target;

/// Records.
pub fn run(args: &TraceArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let (tag, target, hub) = (args.tag.as_deref(), args.target.as_deref(), args.hub.hub.as_deref());
    let request = RetraceRequest {
        target: Target::of(&paths, tag, target, hub),
        name: tag.or(target).unwrap_or_default().to_owned(),
        out: args.out.clone().unwrap_or_default(),
        force: args.force,
        eval: args.eval.clone(),
        recipe: args.recipe.clone(),
        level: args.level,
        cache: args.cache.options(),
    };
    let report = retrace(&paths, &request, &Caller::new(output))?;
    output.report(&report, show);
    Ok(ExitCode::SUCCESS)
}

fn show(report: &RetraceReport) -> String {
    let RetraceReport { name, before, after, common_pages, .. } = report;
    let mut rows = vec![["", ">BEFORE", ">AFTER"].map(str::to_owned).to_vec()];
    let mut row = |what: &str, of: &dyn Fn(&WorkingSetShare) -> Option<String>| {
        let before = before.as_ref().and_then(of).unwrap_or_else(|| "-".to_owned());
        rows.push(vec![what.to_owned(), before, of(after).unwrap_or_else(|| "-".to_owned())]);
    };
    row("pages", &|share| Some(share.pages.to_string()));
    row("bytes", &|share| Some(show_size(share.bytes)));
    row("share", &|share| Some(format!("{:.1}%", share.share * 100.0)));
    for (at, bucket) in after.buckets.iter().enumerate() {
        row(&bucket.name, &|share| share.buckets.get(at).map(|bucket| bucket.pages.to_string()));
    }
    let mut text = table(&rows);
    if let Some(before) = before {
        let (kept, of) = (show_share(*common_pages, before.pages), before.pages);
        text.push_str(&format!("{common_pages} of the {of} pages of before are in both ({kept})\n"));
    }
    text.push_str(&match &report.out {
        Some(out) => format!("{name} with the new working set: {}\n", out.display()),
        None => format!("`forkd pack --tag {name} --out FILE` packs it with the new working set\n"),
    });
    text
}
