//! `forkd hub publish`: a pack into a hub's folder.

use std::process::ExitCode;
use std::sync::Arc;

use forkd_fs::format::TRACE;
use forkd_fs::prefetch;
use forkd_fs::source::HttpClient;
use forkd_fs::store::{OpenError, PackLocation, PackSource, Store, StoreOptions};
use forkd_fs::trace::{MAX_TRACE_LEN, Trace};

use crate::cli::PublishArgs;
use crate::error::CommandError;
use crate::output::Output;
use crate::units::show_size;
use forkd_engine::hub::publish::{Contents, Publication, publish};
use forkd_engine::progress::{Amount, Progress};

/// Reads what the pack is, then copies it in and enters it.
pub fn run(args: &PublishArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let package = args.name.parse()?;
    let contents = super::runtime()?.block_on(contents(args))?;
    let progress = output.begin("publishing", Amount::Unknown);
    let publication = Publication {
        pack: &args.pack,
        hub: &args.hub,
        package,
        version: args.version.clone(),
        recipe_path: args.recipe_path.clone(),
    };
    let published = publish(&publication, &contents)?;
    drop(progress);
    output.report(&published, |published| {
        format!(
            "published {}@{} ({}) as {}",
            published.package,
            published.version,
            show_size(published.size_bytes),
            published.file.display()
        )
    });
    Ok(ExitCode::SUCCESS)
}

/// What the registry is to say about the pack. Opening it checks the index; a broken pack is not published.
async fn contents(args: &PublishArgs) -> Result<Contents, CommandError> {
    let location = PackLocation { source: PackSource::Path(args.pack.clone()), size: None, index: None };
    let options = StoreOptions { http: HttpClient::default(), ..StoreOptions::default() };
    let store = match Store::open(location, options).await {
        Ok(store) => store,
        Err(OpenError::Legacy { version, .. }) => return Ok(Contents::Legacy { version }),
        Err(error) => return Err(error.into()),
    };
    let manifest = Box::new((*store.manifest().await?).clone());
    Ok(Contents::Indexed { pin: store.index_pin(), manifest, head_size: head_size(&store).await? })
}

/// `None` of a pack whose trace nobody could use: it may be of another monitor's machine.
async fn head_size(store: &Arc<Store>) -> Result<Option<u64>, CommandError> {
    let index = store.index();
    let entry = index.file(TRACE).and_then(|file| index.entry(file));
    if entry.is_none_or(|entry| entry.size > MAX_TRACE_LEN) {
        return Ok(None);
    }
    let trace = store.read_files(&[TRACE], MAX_TRACE_LEN).await?;
    Ok(Trace::decode(&trace[0]).ok().map(|trace| prefetch::head_len(index, &trace)))
}
