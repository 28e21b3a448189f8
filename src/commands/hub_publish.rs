//! `forkd hub publish`: a pack into a hub's folder.

use std::process::ExitCode;

use forkd_fs::source::HttpClient;
use forkd_fs::store::{OpenError, PackLocation, PackSource, Store, StoreOptions};

use crate::cli::PublishArgs;
use crate::error::CommandError;
use crate::hub::publish::{Contents, Publication, publish};
use crate::output::Output;
use crate::progress::Progress;
use crate::units::show_size;

/// Reads what the pack is, then copies it in and enters it.
pub fn run(args: &PublishArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let package = args.name.parse()?;
    let contents = super::runtime()?.block_on(contents(args))?;
    let progress = Progress::spinner(output, "publishing");
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
    let manifest = store.manifest().await?;
    Ok(Contents::Indexed { pin: store.index_pin(), manifest: Box::new((*manifest).clone()) })
}
