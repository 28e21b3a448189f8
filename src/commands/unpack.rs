//! `forkd unpack`: a pack into a local snapshot.

use std::process::ExitCode;

use crate::cli::UnpackArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use crate::runtime::runtime;
use crate::units::show_size;
use forkd_engine::build::unpack::{Unpacked, unpack_file};
use forkd_fs::format::PACK_VERSION;

/// Unpacks.
pub fn run(args: &UnpackArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let unpacking = unpack_file(&paths, &args.file, args.tag.as_deref(), args.force, output);
    let unpacked = runtime().map_err(CommandError::Runtime)?.block_on(unpacking)?;
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
