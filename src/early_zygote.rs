//! What `forkd fork` begins before its command line is understood.

use forkd_engine::fork::supervisor::process_start_ns;
use forkd_engine::fork::zygote::start_zygote;
use forkd_vmm::zygote::{SpawnError, Zygote};
use std::ffi::OsString;

/// What is begun before the command line is understood, because a first instruction waits for it: the jail takes longer to
/// build than the command line to parse.
pub struct EarlyZygote {
    /// When the process started, CLOCK_MONOTONIC, ns.
    pub started_ns: u64,
    /// Not yet where the process will split: the zygote is to be a child of the one that goes on.
    pub zygote: Option<Result<Zygote, SpawnError>>,
}

impl EarlyZygote {
    /// For arguments (the program's name first) that look like a fork's: options before the verb take no values.
    pub fn of(arguments: &[OsString]) -> Option<EarlyZygote> {
        let mut words = arguments.iter().skip(1).filter(|word| !word.as_encoded_bytes().starts_with(b"-"));
        let splits = arguments.iter().any(|word| word == "--detach");
        words
            .next()
            .is_some_and(|verb| verb == "fork")
            .then(|| EarlyZygote { started_ns: process_start_ns(), zygote: (!splits).then(start_zygote) })
    }
}

impl Default for EarlyZygote {
    fn default() -> EarlyZygote {
        EarlyZygote { started_ns: process_start_ns(), zygote: None }
    }
}
