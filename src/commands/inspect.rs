//! `forkd inspect`: what is in a pack, from its index, its manifest and its trace alone; or what a running child has in
//! its memory.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use forkd_fs::digest::Digest;
use forkd_fs::format::MANIFEST;
use forkd_fs::legacy::head::{HeadError, LegacyHead};
use forkd_fs::legacy::{self, LegacyManifest};
use forkd_fs::source::redact_url;
use forkd_fs::store::{OpenError, PackSource, ReadError, Store, StoreOptions};
use serde::Serialize;

use super::unpack::{LEGACY_LIMIT, UnpackCommandError};
use crate::cli::InspectArgs;
use crate::error::CommandError;
use crate::output::{Output, table};
use crate::units::{show_share, show_size};
use forkd_engine::hub::packs;
use forkd_engine::local::paths::Paths;
use forkd_engine::local::snapshots::FOREIGN_MACHINE;
use forkd_engine::picture::svg::check_place;

mod child;
mod heatmap;
mod working_set;
use working_set::WorkingSet;

/// What `forkd inspect --json` prints. Of the predecessor's packs only the first half is known.
#[derive(Debug, Serialize)]
struct Report {
    location: String,
    pack_format: u32,
    tag: String,
    description: String,
    base_image: String,
    created_at: String,
    forkd_version: String,
    size_bytes: u64,
    /// Null when a pack of the predecessor was not read whole and its manifest does not tell.
    plain_bytes: Option<u64>,
    ratio: Option<f64>,
    files: Vec<File>,
    /// Why it cannot be forked; null when nothing in the pack forbids it.
    unforkable: Option<String>,
    requires: Option<forkd_fs::manifest::Requires>,
    chunks: Option<Chunks>,
    /// What a fork touches, as recorded; null without a trace.
    working_set: Option<working_set::Report>,
    index: Option<Pin>,
    fetched_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct File {
    path: String,
    size: u64,
    sha256: Option<Digest>,
    chunks: Option<u32>,
    stored_chunks: Option<u32>,
    stored_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Chunks {
    size: u32,
    total: u64,
    stored: u64,
    stored_bytes: u64,
    /// Share of the chunks that are zero and not stored.
    zero_share: f64,
    /// Stored chunks the recorded working set touches; null without a trace.
    traced: Option<u64>,
    traced_bytes: Option<u64>,
    /// Share of the stored bytes that the working set needs.
    trace_share: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Pin {
    offset: u64,
    size: u64,
    sha256: Digest,
}

/// Inspects.
pub fn run(args: &InspectArgs, output: &Output) -> Result<ExitCode, CommandError> {
    if let Some(file) = &args.heatmap {
        check_place(file)?;
    }
    if let Some(id) = &args.child {
        return child::run(id, args.heatmap.as_deref(), output);
    }
    let report = super::runtime()?.block_on(inspect(args))?;
    output.report(&report, show);
    Ok(ExitCode::SUCCESS)
}

async fn inspect(args: &InspectArgs) -> Result<Report, CommandError> {
    let (paths, target) = (Paths::from_env()?, args.target.as_deref().unwrap_or_default());
    let http = packs::http_client(&paths);
    let target = packs::find(target, &paths, args.hub.hub.as_deref(), &http).await?;
    let location = target.location().clone();
    // No cache: what is shown is what is there now.
    let options = StoreOptions { http, ..StoreOptions::default() };
    match (Store::open(location.clone(), options.clone()).await, &location.source) {
        (Ok(store), _) => {
            let working_set = WorkingSet::read(&store).await?;
            if let Some(file) = &args.heatmap {
                heatmap::of_pack(&store, working_set.as_ref(), &paths).draw().write(file)?;
            }
            Ok(of_store(&store, working_set.as_ref()).await?)
        }
        (Err(error @ OpenError::Legacy { .. }), _) if args.heatmap.is_some() => Err(error.into()),
        (Err(OpenError::Legacy { .. }), PackSource::Path(path)) => {
            Ok(of_legacy(path).map_err(UnpackCommandError::from)?)
        }
        (Err(OpenError::Legacy { .. }), PackSource::Url(url)) => {
            match LegacyHead::fetch(&location, &options).await {
                Ok(head) => Ok(of_head(redact_url(url), head)),
                Err(HeadError::Source { location, source }) => {
                    Err(OpenError::Source { location, source }.into())
                }
                Err(HeadError::Pack(error)) => Err(UnpackCommandError::from(error).into()),
            }
        }
        (Err(error), _) => Err(error.into()),
    }
}

async fn of_store(store: &Arc<Store>, working_set: Option<&WorkingSet>) -> Result<Report, ReadError> {
    let (manifest, index) = (store.manifest().await?, store.index());
    let files = index.files().map(|(id, entry)| {
        let stats = index.stats(id);
        File {
            path: entry.name.clone(),
            size: entry.size,
            sha256: manifest.file(&entry.name).map(|file| file.sha256),
            chunks: Some(stats.chunks),
            stored_chunks: Some(stats.stored_chunks),
            stored_bytes: Some(stats.stored_bytes),
        }
    });
    let files: Vec<File> = files.collect();
    let plain_bytes = files.iter().map(|file| file.size).sum();
    let total = files.iter().filter_map(|file| file.chunks).map(u64::from).sum();
    let (stored, stored_bytes) = (u64::from(index.stored_chunk_count()), index.stored_bytes());
    let working_set = working_set.map(|set| set.report(store));
    let traced = working_set.as_ref().map(|set| (set.chunks, set.chunk_bytes));
    let pin = store.index_pin();
    Ok(Report {
        location: store.location().to_owned(),
        pack_format: manifest.forkd_pack_version,
        tag: manifest.tag.clone(),
        description: manifest.description.clone(),
        base_image: manifest.base_image.clone(),
        created_at: manifest.created_at.clone(),
        forkd_version: manifest.forkd_version.clone(),
        size_bytes: index.pack_size(),
        plain_bytes: Some(plain_bytes),
        ratio: Some(share(plain_bytes, index.pack_size())),
        files,
        unforkable: manifest.requires.is_foreign().then(|| FOREIGN_MACHINE.to_owned()),
        requires: Some(manifest.requires.clone()),
        chunks: Some(Chunks {
            size: index.chunk_size(),
            total,
            stored,
            stored_bytes,
            zero_share: share(total - stored, total),
            traced: traced.map(|(chunks, _)| chunks),
            traced_bytes: traced.map(|(_, bytes)| bytes),
            trace_share: traced.map(|(_, bytes)| share(bytes, stored_bytes)),
        }),
        working_set,
        index: Some(Pin { offset: pin.offset, size: pin.length, sha256: pin.sha256 }),
        fetched_bytes: Some(store.progress().bytes_fetched),
    })
}

fn of_legacy(path: &Path) -> Result<Report, legacy::LegacyError> {
    let pack = legacy::list(path, LEGACY_LIMIT)?;
    let size_bytes = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let file =
        |member: &legacy::LegacyMember| legacy_file(member.path(), member.size, pack.manifest.digest(member));
    let files: Vec<File> = pack.members.iter().map(file).collect();
    let plain_bytes = files.iter().map(|file| file.size).sum();
    let location = path.display().to_string();
    Ok(legacy_report(location, pack.manifest, size_bytes, files, Some(plain_bytes), None))
}

/// Of a pack on a server: its manifest is believed about the members that were not read.
fn of_head(location: String, head: LegacyHead) -> Report {
    let listed = head.manifest.listed();
    let told = !listed.is_empty() && listed.iter().all(|file| file.size.is_some());
    let mut files = vec![legacy_file(MANIFEST.to_owned(), head.manifest_size, None)];
    let listed =
        listed.into_iter().map(|file| legacy_file(file.path, file.size.unwrap_or(0), Some(file.sha256)));
    files.extend(listed);
    let plain_bytes = told.then(|| files.iter().fold(0u64, |sum, file| sum.saturating_add(file.size)));
    legacy_report(location, head.manifest, head.packed_size, files, plain_bytes, Some(head.fetched_bytes))
}

fn legacy_file(path: String, size: u64, sha256: Option<Digest>) -> File {
    File { path, size, sha256, chunks: None, stored_chunks: None, stored_bytes: None }
}

fn legacy_report(
    location: String,
    manifest: LegacyManifest,
    size_bytes: u64,
    files: Vec<File>,
    plain_bytes: Option<u64>,
    fetched_bytes: Option<u64>,
) -> Report {
    Report {
        location,
        pack_format: manifest.forkd_pack_version,
        tag: manifest.tag,
        description: manifest.description,
        base_image: manifest.base_image,
        created_at: manifest.created_at,
        forkd_version: manifest.forkd_version,
        size_bytes,
        plain_bytes,
        ratio: plain_bytes.map(|plain| share(plain, size_bytes)),
        files,
        unforkable: Some(FOREIGN_MACHINE.to_owned()),
        requires: None,
        chunks: None,
        working_set: None,
        index: None,
        fetched_bytes,
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn show(report: &Report) -> String {
    let mut rows = vec![
        vec!["pack".to_owned(), report.location.clone()],
        vec!["format".to_owned(), format!("v{}", report.pack_format)],
        vec!["tag".to_owned(), printable(&report.tag)],
    ];
    for (label, text) in [
        ("description", &report.description),
        ("base image", &report.base_image),
        ("created", &report.created_at),
        ("made by", &report.forkd_version),
    ] {
        if !text.is_empty() {
            rows.push(vec![label.to_owned(), printable(text)]);
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
            printable(&needs.kernel)
        );
        rows.push(vec!["needs".to_owned(), text]);
    }
    if let Some(chunks) = &report.chunks {
        let zero = show_share(chunks.total - chunks.stored, chunks.total);
        let text = format!("{} of {}, {zero} zero", chunks.total, show_size(u64::from(chunks.size)));
        rows.push(vec!["chunks".to_owned(), text]);
    }
    if let Some(set) = &report.working_set {
        rows.extend(working_set_rows(set));
    }
    if let Some(why) = &report.unforkable {
        rows.push(vec!["fork".to_owned(), format!("no: {why}")]);
    }
    format!("{}\n{}", table(&rows), files_table(report))
}

fn working_set_rows(set: &working_set::Report) -> Vec<Vec<String>> {
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

fn files_table(report: &Report) -> String {
    let mut rows = vec![["FILE", ">SIZE", ">STORED", ">ZERO", "SHA256"].map(str::to_owned).to_vec()];
    for file in &report.files {
        let zero = match (file.chunks, file.stored_chunks) {
            (Some(all), Some(stored)) => show_share(u64::from(all - stored), u64::from(all)),
            _ => "-".to_owned(),
        };
        rows.push(vec![
            printable(&file.path),
            show_size(file.size),
            file.stored_bytes.map_or_else(|| "-".to_owned(), show_size),
            zero,
            file.sha256.map_or_else(|| "-".to_owned(), |digest| digest.to_string()),
        ]);
    }
    table(&rows)
}

/// Text out of a pack without control characters: it goes to a terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
