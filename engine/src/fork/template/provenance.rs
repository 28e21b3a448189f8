//! What a template was opened from: what a snapshot of a child says of its base.

use crate::local::lineage::{Base, Lineage};
use forkd_fs::manifest::Manifest;
use rustix::fd::OwnedFd;
use serde::{Deserialize, Serialize};
use std::fs::File;

/// What a template was opened from.
#[derive(Debug, Default)]
pub(super) struct Provenance {
    /// What it was called, as far as that is settled.
    pub(super) name: String,
    pub(super) manifest: Option<Manifest>,
    /// What it is a difference from itself.
    pub(super) base: Option<Base>,
    /// The pages of a first restore, where there is a file of them.
    pub(super) trace: Option<File>,
    /// The images on disk, in their order, where those that are mapped are in memory.
    pub(super) on_disk: Vec<OwnedFd>,
}

/// What another process that holds the images says of them.
#[derive(Debug, Serialize, Deserialize)]
pub struct ResidentProvenance {
    pub(super) manifest: Manifest,
    pub(super) base: Base,
}

impl Provenance {
    pub(super) fn of_snapshot(
        manifest: Option<Manifest>,
        lineage: Option<Lineage>,
        trace: Option<File>,
    ) -> Option<Provenance> {
        let base = lineage.and_then(|lineage| lineage.base);
        Some(Provenance { manifest, base, trace, ..Provenance::default() })
    }

    pub(super) fn of_pack(manifest: Manifest) -> Provenance {
        Provenance { manifest: Some(manifest), ..Provenance::default() }
    }

    pub(super) fn of_resident(said: ResidentProvenance, on_disk: Vec<OwnedFd>) -> Provenance {
        let ResidentProvenance { manifest, base } = said;
        Provenance { manifest: Some(manifest), base: Some(base), on_disk, ..Provenance::default() }
    }

    /// The images' files are about to be replaced by others in memory.
    pub(super) fn keep_on_disk(&mut self, file: OwnedFd) {
        self.on_disk.push(file);
    }
}
