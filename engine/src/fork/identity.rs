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

/// A record with fresh entropy and machine id, the host name `forkd-<id>` and the time of now. `number` is not 0.
pub fn fresh(
    id: &str,
    number: u64,
    network: Option<NetworkIdentity>,
    environment: BTreeMap<String, String>,
) -> Result<Vec<u8>, IdentityError> {
    let mut entropy = [0; 64];
    let mut machine_id = [0; 16];
    let mut random = File::open("/dev/urandom").map_err(IdentityError::Entropy)?;
    random
        .read_exact(&mut entropy)
        .and_then(|()| random.read_exact(&mut machine_id))
        .map_err(IdentityError::Entropy)?;
    let unix_time_ns =
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    let hostname = format!("forkd-{id}");
    let generation = number;
    Ok(Generation { generation, unix_time_ns, entropy, hostname, machine_id, network, environment }
        .encode()?)
}
