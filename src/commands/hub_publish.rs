//! `forkd hub publish`: a pack into a hub's folder.

use std::process::ExitCode;

use crate::cli::PublishArgs;
use crate::failure::CommandError;
use crate::output::Output;
use crate::runtime::runtime;
use crate::units::show_size;
use forkd_engine::hub::publish::{PackContents, PublishRequest, Published, PublishedBase, publish};
use forkd_engine::progress::{Amount, Progress};

/// Reads what the pack is, then copies it in and enters it.
pub fn run(args: &PublishArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let package = args.name.parse()?;
    let contents = runtime().map_err(CommandError::Runtime)?.block_on(PackContents::read(&args.pack))?;
    let progress = output.begin("publishing", Amount::Unknown);
    let publication = PublishRequest {
        pack: &args.pack,
        hub: &args.hub,
        package,
        version: args.version.clone(),
        recipe_path: args.recipe_path.clone(),
        github: args.github.clone(),
    };
    let published = publish(&publication, &contents)?;
    drop(progress);
    for base in published.bases.iter().filter(|base| base.reference.is_none()) {
        output.note(missing_base(base));
    }
    output.report(&published, show);
    Ok(ExitCode::SUCCESS)
}

/// Said of a base that the registry does not have.
fn missing_base(base: &PublishedBase) -> String {
    let elsewhere = match base.hint.as_str() {
        "" => "copies work where it is in a registry they read, or in their chunk cache".to_owned(),
        hint => format!("it is looked for as {hint}, too"),
    };
    format!("note: its base, with index sha256 {}, is not in this registry; {elsewhere}", base.index_sha256)
}

fn show(published: &Published) -> String {
    let Published { package, version, size_bytes, file, release, .. } = published;
    let size = show_size(*size_bytes);
    match release {
        None => format!("published {package}@{version} ({size}) as {}", file.display()),
        Some(release) => format!(
            "entered {package}@{version} ({size}) as {}\nmake the release, then commit registry.json:\n{}",
            release.url,
            release.commands.join("\n")
        ),
    }
}
