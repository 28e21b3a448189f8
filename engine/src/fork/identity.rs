//! What makes a copy someone of its own: the generation record that a fork reads first.

use forkd_abi::generation::{Generation, GenerationError, NetworkIdentity};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::time::{SystemTime, UNIX_EPOCH};

/// No identity could be made.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// No random bytes.
    #[error("/dev/urandom cannot be read")]
    Entropy(#[source] io::Error),
    /// The record.
    #[error(transparent)]
    Generation(#[from] GenerationError),
}

/// A machine id.
pub type MachineId = [u8; 16];

/// Random bytes for whatever is to be unlike everything else.
pub fn random<const N: usize>() -> Result<[u8; N], IdentityError> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(IdentityError::Entropy)?;
    Ok(bytes)
}

/// What the machine of the child `id` is called.
pub fn hostname(id: &str) -> String {
    format!("forkd-{id}")
}

/// A record with fresh entropy, the host name `forkd-<id>` and the time of now. `number` is not 0. A machine that already
/// is someone keeps its machine id where this one is all zero.
pub fn record(
    id: &str,
    number: u64,
    machine_id: MachineId,
    network: Option<NetworkIdentity>,
    environment: BTreeMap<String, String>,
) -> Result<Vec<u8>, IdentityError> {
    let entropy = random()?;
    let unix_time_ns =
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    let hostname = hostname(id);
    let generation = number;
    Ok(Generation { generation, unix_time_ns, entropy, hostname, machine_id, network, environment }
        .encode()?)
}
