//! `forkd unpack`: a pack into a local snapshot.

use std::process::ExitCode;

use crate::cli::UnpackArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use crate::runtime::runtime;
use crate::units::show_size;
use forkd_engine::build::unpack::{Unpacked, unpack_file};
use forkd_engine::hub::client;
use forkd_fs::format::PACK_VERSION;

/// Unpacks.
pub fn run(args: &UnpackArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let (hub, tag) = (args.hub.hub.as_deref(), args.tag.as_deref());
    let runtime = runtime().map_err(CommandError::Runtime)?;
    let unpacked = runtime.block_on(async {
        let options = client::store_options(&paths, args.cache.options(), &client::http_client(&paths), hub);
        unpack_file(&paths, &args.file, options, tag, args.force, output).await
    })?;
    output.report(&unpacked, |unpacked| format!("unpacked {}", line(unpacked)));
    Ok(ExitCode::SUCCESS)
}

/// A new snapshot, for people; without the verb.
pub(super) fn line(unpacked: &Unpacked) -> String {
    let Unpacked { tag, path, plain_bytes, pack_format } = unpacked;
    let mut line = format!("{tag}: {} in {}", show_size(*plain_bytes), path.display());
    if *pack_format < PACK_VERSION {
        line.push_str(&format!(
            "\nit is a pack of layout {pack_format}: its files are here, but its Firecracker state cannot be forked"
        ));
    }
    line
}
