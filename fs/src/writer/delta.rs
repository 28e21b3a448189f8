//! What a delta does not have to hold: the chunks that its base, or a base of that, has already.
//!
//! Chunks are told apart by their frames' digests, as everywhere, so that of the base no more than the index is needed.
//! That takes frames compressed alike. One chunk of the base tells whether they are; where they are not, chunks in the
//! same place are compared byte by byte.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread;

use bytes::Bytes;

use super::compress::compressor;
use super::error::WriteError;
use super::member::Member;
use super::options::{OnProgress, PackOptions, PackProgress, Pass};
use crate::digest::Digest;
use crate::format::{self, MAX_BASES, SNAPSHOT, TRACE, VMSTATE};
use crate::index::{BasePack, ChunkId, ChunkRecord, Index};
use crate::store::ReadError;

/// Small members that every pack holds itself, so that they come with its index.
const OWN: [&str; 3] = [SNAPSHOT, VMSTATE, TRACE];
/// Name of the text that tells people who take the archive apart by other means what is missing.
const NOTICE: &str = "DELTA.txt";

/// The pack that a delta is made of.
pub struct DeltaBase<'a> {
    /// Its index.
    pub index: &'a Index,
    /// How the delta names it.
    pub pack: BasePack,
    /// Reads a chunk of it.
    pub read: &'a dyn Fn(ChunkId) -> Result<Bytes, ReadError>,
}

/// A chunk that is not zero, and what the base has for it.
struct Candidate {
    member: usize,
    chunk: u32,
    found: Option<ChunkRecord>,
}

impl DeltaBase<'_> {
    /// Takes the chunks that the base has out of those that are stored. Returns the packs that hold them: the base, and
    /// those of its own bases that are needed.
    pub(super) fn find_chunks(
        &self,
        members: &mut [Member],
        options: PackOptions,
        on_progress: OnProgress<'_>,
    ) -> Result<Vec<BasePack>, WriteError> {
        if self.index.chunk_size() != options.chunk_size {
            let (chunk_size, base) = (options.chunk_size, self.index.chunk_size());
            return Err(WriteError::BaseChunkSize { chunk_size, base });
        }
        let frames = self.frames();
        let mut candidates: Vec<Candidate> = Vec::new();
        for (member, file) in
            members.iter().enumerate().filter(|(_, file)| !OWN.contains(&file.name.as_str()))
        {
            let stored = file.scan.stored.iter();
            candidates.extend(stored.map(|&chunk| Candidate { member, chunk, found: None }));
        }
        let digests = digests(members, &candidates, options, on_progress)?;
        for (candidate, digest) in candidates.iter_mut().zip(digests) {
            candidate.found =
                frames.get(&digest).map(|frame| ChunkRecord { chunk: candidate.chunk, ..*frame });
        }
        self.compare_contents(members, &mut candidates, options)?;
        let bases = self.number(&mut candidates);
        for Candidate { member, found, .. } in candidates {
            members[member].in_bases.extend(found);
        }
        for Member { scan, in_bases, .. } in members {
            let is_own = |chunk: &u32| in_bases.binary_search_by_key(chunk, |record| record.chunk).is_err();
            scan.stored.retain(is_own);
        }
        Ok(bases)
    }

    /// Every frame of the base and its bases by its digest, with the number of its pack in the delta.
    fn frames(&self) -> HashMap<Digest, ChunkRecord> {
        let records = self.index.files().flat_map(|(file, _)| self.index.stored_chunks(file));
        records.map(|(_, record)| (record.digest, of_delta(record))).collect()
    }

    /// Where the base has a chunk in the place of `candidate`, of the same length.
    fn same_place(&self, members: &[Member], candidate: &Candidate) -> Option<(ChunkId, ChunkRecord)> {
        let member = &members[candidate.member];
        let id = ChunkId { file: self.index.file(&member.name)?, chunk: candidate.chunk };
        let record = self.index.record(id)?;
        let len = format::chunk_len(member.scan.size, self.index.chunk_size(), candidate.chunk);
        (self.index.plain_len(id) == len).then(|| (id, of_delta(record)))
    }

    /// Looks into the chunks whose digests differ, if that does not mean that they do.
    fn compare_contents(
        &self,
        members: &[Member],
        candidates: &mut [Candidate],
        options: PackOptions,
    ) -> Result<(), WriteError> {
        let differing = candidates.iter_mut().filter(|candidate| candidate.found.is_none());
        let differing: Vec<_> = differing
            .filter_map(|candidate| {
                self.same_place(members, candidate).map(|(id, frame)| (candidate, id, frame))
            })
            .collect();
        // The longer a frame, the less likely that two levels come to the same.
        let Some((_, sample, frame)) = differing.iter().max_by_key(|(_, _, frame)| frame.length) else {
            return Ok(());
        };
        let read = |id| (self.read)(id).map_err(|error| WriteError::Base(Box::new(error)));
        let again = compressor(options.level)?.compress(&read(*sample)?).map_err(WriteError::Compress)?;
        if Digest::of(&again) == frame.digest {
            return Ok(());
        }
        tracing::debug!("the base is compressed otherwise: its chunks are compared byte by byte");
        for (candidate, id, frame) in differing {
            let own = read_chunk(&members[candidate.member], candidate.chunk, options.chunk_size)?;
            if own == read(id)? {
                candidate.found = Some(ChunkRecord { chunk: candidate.chunk, ..frame });
            }
        }
        Ok(())
    }

    /// Numbers the packs that hold what was found. Where they are more than a delta may name, the chunks of those that
    /// hold least are not taken from them: the delta holds these itself.
    fn number(&self, candidates: &mut [Candidate]) -> Vec<BasePack> {
        let all: Vec<&BasePack> = std::iter::once(&self.pack).chain(self.index.bases()).collect();
        let mut held = vec![0; all.len()];
        let found =
            |candidate: &Candidate| candidate.found.map(|record| (usize::from(record.pack) - 1, record));
        for (pack, record) in candidates.iter().filter_map(found) {
            held[pack] += u64::from(record.length);
        }
        let mut kept: Vec<usize> = (1..all.len()).filter(|&pack| held[pack] > 0).collect();
        kept.sort_by_key(|&pack| (std::cmp::Reverse(held[pack]), pack));
        // The base itself is always named.
        kept.truncate(MAX_BASES - 1);
        kept.push(0);
        kept.sort_unstable();
        for candidate in candidates {
            let number = found(candidate).and_then(|(pack, _)| kept.binary_search(&pack).ok());
            candidate.found = candidate.found.zip(number).map(|(record, number)| {
                let pack = number as u8 + 1;
                ChunkRecord { pack, ..record }
            });
        }
        kept.into_iter().map(|pack| all[pack].clone()).collect()
    }
}

/// A record of the base as one of the delta: the base is its first pack, and the base's first pack its second.
fn of_delta(record: &ChunkRecord) -> ChunkRecord {
    ChunkRecord { pack: record.pack + 1, ..*record }
}

/// The digest of each chunk's frame, compressed as the delta's are.
fn digests(
    members: &[Member],
    candidates: &[Candidate],
    options: PackOptions,
    on_progress: OnProgress<'_>,
) -> Result<Vec<Digest>, WriteError> {
    let (next, done) = (AtomicUsize::new(0), AtomicU64::new(0));
    let chunk_size = options.chunk_size;
    let size = |candidate: &Candidate| {
        u64::from(format::chunk_len(members[candidate.member].scan.size, chunk_size, candidate.chunk))
    };
    let total = candidates.iter().map(size).sum();
    let work = || -> Result<Vec<(usize, Digest)>, WriteError> {
        let (mut compressor, mut digests) = (compressor(options.level)?, Vec::new());
        loop {
            let at = next.fetch_add(1, Relaxed);
            let Some(candidate) = candidates.get(at) else { return Ok(digests) };
            let plain = read_chunk(&members[candidate.member], candidate.chunk, chunk_size)?;
            let frame = compressor.compress(&plain).map_err(WriteError::Compress)?;
            digests.push((at, Digest::of(&frame)));
            let done = done.fetch_add(size(candidate), Relaxed) + size(candidate);
            on_progress(PackProgress { pass: Pass::Compare, done, total });
        }
    };
    let found = thread::scope(|scope| {
        let running: Vec<_> = (0..options.threads.max(1)).map(|_| scope.spawn(work)).collect();
        let parts = running.into_iter().map(|thread| thread.join().expect("comparing does not panic"));
        parts.collect::<Result<Vec<_>, _>>()
    })?;
    let mut found: Vec<_> = found.into_iter().flatten().collect();
    found.sort_unstable_by_key(|(at, _)| *at);
    Ok(found.into_iter().map(|(_, digest)| digest).collect())
}

fn read_chunk(member: &Member, chunk: u32, chunk_size: u32) -> Result<Vec<u8>, WriteError> {
    let mut plain = vec![0; format::chunk_len(member.scan.size, chunk_size, chunk) as usize];
    let read = member.file.read_exact_at(&mut plain, u64::from(chunk) * u64::from(chunk_size));
    read.map_err(|source| WriteError::Read { path: member.path.clone(), source })?;
    Ok(plain)
}

/// A member of tar that no index mentions: what is missing, for people.
pub(super) fn notice(members: &[Member], bases: &[BasePack], chunk_size: u32) -> Vec<u8> {
    let mut text = String::from(
        "This pack is a delta. It holds only what differs from other packs, and is of no use without them.\n\
         forkd finds them by the sha256 of their index; `forkd repack` makes one whole pack of all.\n\nMissing here:\n\n",
    );
    for (number, base) in (1..).zip(bases) {
        let held = members.iter().flat_map(|member| &member.in_bases).filter(|record| record.pack == number);
        let hint = if base.hint.is_empty() { String::new() } else { format!(" ({})", base.hint) };
        text.push_str(&format!(
            "{} chunks of the pack with index sha256 {}{hint}\n",
            held.count(),
            base.index.sha256
        ));
    }
    text.push_str("\nThese files have zeros where chunks are missing:\n\n");
    for member in members.iter().filter(|member| !member.in_bases.is_empty()) {
        let chunks = format::chunk_count(member.scan.size, chunk_size);
        let (missing, name) = (member.in_bases.len(), member.tar_name());
        text.push_str(&format!("{name}: {missing} of {chunks} chunks of {}\n", member.name));
    }
    let mtime = members.first().map_or(0, |member| member.mtime);
    let (mut out, len) = format::tar_member_head(NOTICE, text.len() as u64, chunk_size, &[0], mtime);
    out.extend_from_slice(text.as_bytes());
    out.resize(out.len() + format::tar_padding(len), 0);
    out
}
