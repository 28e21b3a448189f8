//! What a fork's supervisor is told to branch or to take a snapshot of, and what it says of it: on its control socket
//! (`run_dir.rs`).

use crate::local::lineage::Base;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Add;
use std::path::PathBuf;

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

/// Children that lie on disk. Its JSON form is a contract of `forkd pause --to-disk --json`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PausedToDisk {
    /// How many.
    #[serde(rename = "paused")]
    pub children: usize,
    /// Memory that they have in place of what their image has, bytes.
    #[serde(rename = "disk_bytes")]
    pub bytes: u64,
}

impl Add for PausedToDisk {
    type Output = PausedToDisk;

    fn add(self, other: PausedToDisk) -> PausedToDisk {
        PausedToDisk { children: self.children + other.children, bytes: self.bytes + other.bytes }
    }
}

/// A snapshot of a child that is to be taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRequest {
    /// The child.
    pub child: String,
    /// What the snapshot will be called.
    pub tag: String,
    /// The empty directory that its files go into.
    pub into: PathBuf,
}

/// A snapshot of a child that was taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TakenSnapshot {
    /// How long the child stood still, ms.
    pub pause_ms: f64,
    /// Memory that it has in place of what the image has, bytes.
    pub copied_bytes: u64,
    /// In how many ranges that lies.
    pub ranges: u64,
    /// What it is a difference from; `None` where all of it is stored.
    pub base: Option<Base>,
}
