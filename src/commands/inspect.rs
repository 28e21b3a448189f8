//! `forkd inspect`: what is in a pack, from its index, its manifest and its trace alone; or what a running child has in
//! its memory.

use std::path::Path;
use std::process::ExitCode;

use crate::cli::InspectArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::runtime::runtime;
use crate::units::{show_share, show_size};
use forkd_engine::chain::plain;
use forkd_engine::inspect::child_memory::{self, ChildMemory};
use forkd_engine::inspect::pack::{BaseDescription, PackDescription, inspect};
use forkd_engine::inspect::working_set::WorkingSetWeight;
use forkd_engine::local::paths::Paths;
use forkd_engine::picture::svg::check_place;
use forkd_engine::target::Target;
use forkd_vmm::memory::PAGE_BYTES;

/// Inspects.
pub fn run(args: &InspectArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let heatmap = args.heatmap.as_deref();
    heatmap.map(check_place).transpose()?;
    let paths = environment::paths()?;
    if let Some(id) = &args.child {
        return look_at_child(&paths, id, heatmap, output);
    }
    let target = Target::parse(&paths, args.target.as_deref().unwrap_or_default(), args.hub.hub.as_deref());
    let runtime = runtime().map_err(CommandError::Runtime)?;
    let report = runtime.block_on(inspect(&paths, &target, heatmap))?;
    output.report(&report, show);
    Ok(ExitCode::SUCCESS)
}

fn look_at_child(
    paths: &Paths,
    id: &str,
    heatmap: Option<&Path>,
    output: &Output,
) -> Result<ExitCode, CommandError> {
    let memory = child_memory::look(paths, id)?;
    if let Some(file) = heatmap {
        memory.heatmap().draw().write(file)?;
    }
    output.report(&memory, show_child);
    Ok(ExitCode::SUCCESS)
}

fn show_child(report: &ChildMemory) -> String {
    let mut rows = vec![["IMAGE", ">SIZE", ">PRIVATE", ">SHARE", ">SHARED"].map(str::to_owned).to_vec()];
    for image in &report.images {
        rows.push(vec![
            image.name.to_owned(),
            show_size(image.pages * PAGE_BYTES),
            show_size(image.private_pages * PAGE_BYTES),
            show_share(image.private_pages, image.pages),
            show_size(image.mapped_pages * PAGE_BYTES),
        ]);
    }
    format!("child {} (process {}) of {}\n{}", report.child, report.pid, report.pack, table(&rows))
}

fn show(report: &PackDescription) -> String {
    let mut rows = vec![
        vec!["pack".to_owned(), report.location.clone()],
        vec!["format".to_owned(), format!("v{}", report.pack_format)],
        vec!["tag".to_owned(), plain(&report.tag)],
    ];
    for (label, text) in [
        ("description", &report.description),
        ("base image", &report.base_image),
        ("created", &report.created_at),
        ("made by", &report.forkd_version),
    ] {
        if !text.is_empty() {
            rows.push(vec![label.to_owned(), plain(text)]);
        }
    }
    let mut size = show_size(report.size_bytes);
    if let (Some(plain), Some(ratio)) = (report.plain_bytes, report.ratio) {
        size.push_str(&format!(" for {} ({ratio:.1} to 1)", show_size(plain)));
    }
    rows.push(vec!["size".to_owned(), size]);
    // What the machine of another monitor needs is of no use to anyone here.
    if let Some(needs) = report.requires.as_ref().filter(|needs| !needs.is_foreign()) {
        let text = format!(
            "{} MiB, {} vCPU, {} KVM, kernel {}",
            needs.memory_mib,
            needs.vcpus,
            needs.kvm_kind,
            plain(&needs.kernel)
        );
        rows.push(vec!["needs".to_owned(), text]);
    }
    if let Some(chunks) = &report.chunks {
        let zero = show_share(chunks.total - chunks.stored, chunks.total);
        let text = format!("{} of {}, {zero} zero", chunks.total, show_size(u64::from(chunks.size)));
        rows.push(vec!["chunks".to_owned(), text]);
    }
    rows.extend(report.bases.iter().enumerate().map(|(at, base)| base_row(at, base)));
    if let Some(set) = &report.working_set {
        rows.extend(working_set_rows(set));
    }
    if let Some(why) = &report.unforkable {
        rows.push(vec!["fork".to_owned(), format!("no: {why}")]);
    }
    format!("{}\n{}", table(&rows), files_table(report))
}

fn base_row(at: usize, base: &BaseDescription) -> Vec<String> {
    let place = match (&base.location, base.chunks) {
        (Some(place), _) => plain(place),
        (None, 0) => "not needed".to_owned(),
        (None, _) if base.hint.is_empty() => "not found".to_owned(),
        (None, _) => format!("not found, it was {}", plain(&base.hint)),
    };
    let text = format!(
        "{} chunks, {}, of the pack with index sha256 {}: {place}",
        base.chunks,
        show_size(base.stored_bytes),
        base.index_sha256
    );
    vec![if at == 0 { "base".to_owned() } else { String::new() }, text]
}

fn working_set_rows(set: &WorkingSetWeight) -> Vec<Vec<String>> {
    let percent = |share: f64| format!("{:.1}%", share * 100.0);
    let mut text = format!(
        "{} pages in {} chunks, {} ({} of the pack)",
        set.pages,
        set.chunks,
        show_size(set.chunk_bytes),
        percent(set.chunk_share)
    );
    if let (Some(bytes), Some(share)) = (set.hotset_bytes, set.hotset_share) {
        text.push_str(&format!("; by themselves {} ({})", show_size(bytes), percent(share)));
    }
    let mut rows = vec![vec!["working set".to_owned(), text]];
    rows.extend(set.buckets.iter().map(|bucket| {
        let (chunks, bytes) = (bucket.chunks, show_size(bucket.chunk_bytes));
        let share = percent(bucket.chunk_share);
        let text =
            format!("{}: {} pages, {chunks} more chunks, {bytes} ({share})", bucket.name, bucket.pages);
        vec![String::new(), text]
    }));
    rows
}

fn files_table(report: &PackDescription) -> String {
    let mut rows = vec![["FILE", ">SIZE", ">STORED", ">ZERO", "SHA256"].map(str::to_owned).to_vec()];
    for file in &report.files {
        let zero = match (file.chunks, file.stored_chunks) {
            (Some(all), Some(stored)) => show_share(u64::from(all - stored), u64::from(all)),
            _ => "-".to_owned(),
        };
        rows.push(vec![
            plain(&file.path),
            show_size(file.size),
            file.stored_bytes.map_or_else(|| "-".to_owned(), show_size),
            zero,
            file.sha256.map_or_else(|| "-".to_owned(), |digest| digest.to_string()),
        ]);
    }
    table(&rows)
}
