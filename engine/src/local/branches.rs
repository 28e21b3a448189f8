//! What a fork's supervisor is told to branch, and what it says of it: on its control socket (`run_dir.rs`).

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is to be branched, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchRequest {
    /// The child.
    pub child: String,
    /// The environment of each branch, beyond what it has from the child.
    pub environments: Vec<BTreeMap<String, String>>,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Branched {
    /// How long the child stood still, ms.
    pub pause_ms: f64,
    /// Memory that its branches share with each other and not with the image, bytes.
    pub copied_bytes: u64,
    /// In how many ranges that lies.
    pub ranges: u64,
    /// The branches, which are ready or over.
    pub branches: Vec<BranchedChild>,
}

/// One branch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BranchedChild {
    /// Its name.
    pub id: String,
    /// Process id of its machine.
    pub pid: i32,
    /// When it executed its first instruction, CLOCK_MONOTONIC, ns.
    pub first_instruction_ns: Option<u64>,
    /// When it was unique and ready for requests, likewise.
    pub ready_ns: Option<u64>,
    /// Why it is over.
    pub error: Option<String>,
}
