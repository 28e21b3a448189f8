//! Building packs: a directory of files becomes one `.tar.zst` with an index.
//!
//! Two passes: the first digests every file and finds its zero chunks (the manifest, which comes first in the pack,
//! needs the digests, and tar needs the sparse map before the data); the second compresses the rest on all cores.
//! Memory stays at a few chunks a thread. The files must not change meanwhile.
//!
//! For a delta, a pass between them finds the chunks that its base has (`writer/delta.rs`).

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread;

use crate::digest::Digest;
use crate::format::{self, MANIFEST, PACK_VERSION};
use crate::index::{BasePack, ChunkRecord, Index, IndexPin};
use crate::manifest::{Manifest, ManifestFile};
use crate::scan::{FileScan, scan};

mod compress;
mod delta;
mod error;
mod member;
mod options;
mod output;

use compress::{Job, compress_jobs, compressor};
pub use delta::DeltaBase;
pub use error::WriteError;
use member::{Member, member_files};
use options::OnProgress;
pub use options::{PackOptions, PackProgress, Pass};
use output::{Frame, Output};

/// What a finished pack is.
#[derive(Debug, Clone)]
pub struct PackSummary {
    /// Its size in bytes.
    pub pack_size: u64,
    /// Its digest.
    pub pack_sha256: Digest,
    /// Where its index is, for a registry to pin.
    pub index: IndexPin,
    /// Its manifest with the files filled in.
    pub manifest: Manifest,
    /// Chunks stored.
    pub stored_chunks: u32,
    /// Chunks left out because they are in the bases of a delta.
    pub base_chunks: u32,
    /// Chunks left out because they are all zeros.
    pub zero_chunks: u32,
    /// Plain bytes of all files.
    pub plain_bytes: u64,
    /// Bytes of the stored chunks' frames.
    pub stored_bytes: u64,
    /// The packs without which a delta is not whole, its base first.
    pub bases: Vec<BasePack>,
}

impl PackSummary {
    /// How many plain bytes one byte of the pack stands for.
    pub fn ratio(&self) -> f64 {
        self.plain_bytes as f64 / self.pack_size as f64
    }
}

/// Builds packs.
#[derive(Debug, Clone, Default)]
pub struct PackWriter {
    options: PackOptions,
}

/// What the reading side hands to the writing side, in pack order.
enum Step {
    /// Tar's own bytes.
    Tar(Vec<u8>),
    /// A chunk of a member, being compressed.
    Chunk { member: usize, chunk: u32, frame: Receiver<io::Result<Frame>> },
}

impl PackWriter {
    /// A writer with these options.
    pub fn new(options: PackOptions) -> Self {
        Self { options }
    }

    /// Packs the files of `dir` (its own `manifest.toml` and hidden files excepted) into `out`, which appears
    /// complete or not at all. `manifest` describes the pack; its version and files are filled in.
    pub fn write(
        &self,
        dir: &Path,
        manifest: Manifest,
        out: &Path,
        on_progress: OnProgress<'_>,
    ) -> Result<PackSummary, WriteError> {
        self.write_pack(dir, manifest, None, out, on_progress)
    }

    /// As [`PackWriter::write`], but holds only the chunks that `base` does not have.
    pub fn write_delta(
        &self,
        dir: &Path,
        manifest: Manifest,
        base: &DeltaBase<'_>,
        out: &Path,
        on_progress: OnProgress<'_>,
    ) -> Result<PackSummary, WriteError> {
        self.write_pack(dir, manifest, Some(base), out, on_progress)
    }

    fn write_pack(
        &self,
        dir: &Path,
        manifest: Manifest,
        base: Option<&DeltaBase<'_>>,
        out: &Path,
        on_progress: OnProgress<'_>,
    ) -> Result<PackSummary, WriteError> {
        if !format::is_chunk_size(self.options.chunk_size) {
            return Err(WriteError::ChunkSize { chunk_size: self.options.chunk_size });
        }
        let mut members = self.scan_all(dir, on_progress)?;
        let bases = match base {
            Some(base) => base.find_chunks(&mut members, self.options, on_progress)?,
            None => Vec::new(),
        };
        let manifest = complete(manifest, &members);
        let text = manifest.to_toml().into_bytes();
        members.insert(0, self.manifest_member(&text, &members, out)?);
        let records = |member: &Member| member.scan.stored.len() + member.in_bases.len();
        let stored: usize = members.iter().map(records).sum();
        if Index::encoded_len(bases.len(), members.len(), stored) > format::MAX_INDEX_LEN {
            return Err(WriteError::TooManyChunks { chunks: stored });
        }

        let failed = |source| WriteError::Write { path: out.to_owned(), source };
        let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut temporary =
            tempfile::Builder::new().prefix(".forkd-pack-").tempfile_in(parent).map_err(failed)?;
        let mut output = Output::new(temporary.as_file_mut(), compressor(self.options.level)?);
        let records = self.compress_all(&members, &bases, (&mut output, out), on_progress)?;
        let files = members.iter().zip(records).map(|(member, mut records)| {
            records.extend(&member.in_bases);
            records.sort_unstable_by_key(|record| record.chunk);
            (member.name.clone(), member.scan.size, records)
        });
        let (index, pack_size) =
            output.finish(self.options.chunk_size, bases, files.collect()).map_err(failed)?;
        let pack_sha256 = output.close().map_err(failed)?;
        check_unchanged(&members)?;
        temporary.as_file().set_permissions(fs::Permissions::from_mode(0o644)).map_err(failed)?;
        temporary.as_file().sync_all().map_err(failed)?;
        temporary.persist(out).map_err(|error| failed(error.error))?;
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed)?;

        let (index, pin) = index;
        let chunks: u32 = index.files().map(|(file, _)| index.chunk_count(file)).sum();
        let (stored_chunks, stored_bytes) = index.held_by(0);
        Ok(PackSummary {
            pack_size,
            pack_sha256,
            index: pin,
            manifest,
            stored_chunks,
            base_chunks: index.stored_chunk_count() - stored_chunks,
            zero_chunks: chunks - index.stored_chunk_count(),
            plain_bytes: members.iter().map(|member| member.scan.size).sum(),
            stored_bytes,
            bases: index.bases().to_vec(),
        })
    }

    /// First pass: opens and scans the files, one thread each.
    fn scan_all(&self, dir: &Path, on_progress: OnProgress<'_>) -> Result<Vec<Member>, WriteError> {
        let mut files = Vec::new();
        for (name, path) in member_files(dir)? {
            let failed = |source| WriteError::Read { path: path.clone(), source };
            let file = File::open(&path).map_err(failed)?;
            let metadata = file.metadata().map_err(failed)?;
            files.push((name, path, file, metadata.len(), metadata.mtime().max(0) as u64));
        }
        let (total, done) = (files.iter().map(|(.., size, _)| size).sum(), AtomicU64::new(0));
        let on_bytes = |len: u64| {
            let done = done.fetch_add(len, Relaxed) + len;
            on_progress(PackProgress { pass: Pass::Scan, done, total });
        };
        let chunk_size = self.options.chunk_size;
        thread::scope(|scope| {
            let scan_one =
                |file: File| scope.spawn(move || scan(&file, chunk_size, &on_bytes).map(|s| (s, file)));
            let running: Vec<_> = files
                .into_iter()
                .map(|(name, path, file, _, mtime)| (name, path, mtime, scan_one(file)))
                .collect();
            let finish =
                |(name, path, mtime, running): (String, PathBuf, u64, thread::ScopedJoinHandle<_>)| {
                    let scanned: io::Result<(FileScan, File)> = running.join().expect("scans do not panic");
                    match scanned {
                        Ok((scan, file)) => {
                            Ok(Member { name, path, file, scan, mtime, in_bases: Vec::new() })
                        }
                        Err(source) => Err(WriteError::Read { path, source }),
                    }
                };
            running.into_iter().map(finish).collect()
        })
    }

    /// The manifest as a member: in an unnamed file, so that the second pass need not know the difference.
    fn manifest_member(&self, text: &[u8], others: &[Member], out: &Path) -> Result<Member, WriteError> {
        let store = || {
            let mut file = tempfile::tempfile()?;
            file.write_all(text)?;
            let scan = scan(&file, self.options.chunk_size, &|_| ())?;
            Ok((file, scan))
        };
        let (file, scan) = store().map_err(|source| WriteError::Write { path: out.to_owned(), source })?;
        let mtime = others.iter().map(|member| member.mtime).max().unwrap_or(0);
        let (name, path) = (MANIFEST.into(), out.to_owned());
        Ok(Member { name, path, file, scan, mtime, in_bases: Vec::new() })
    }

    /// Second pass: writes every member, returns each one's records.
    fn compress_all(
        &self,
        members: &[Member],
        bases: &[BasePack],
        (output, out): (&mut Output<'_>, &Path),
        on_progress: OnProgress<'_>,
    ) -> Result<Vec<Vec<ChunkRecord>>, WriteError> {
        let total = members.iter().flat_map(|member| self.stored_lens(member)).sum();
        let threads = self.options.threads.max(1);
        let (jobs, queue) = sync_channel::<Job>(threads * 2);
        let (steps, in_order) = sync_channel::<Step>(threads * 4);
        let queue = Mutex::new(queue);
        let mut compressors =
            (0..threads).map(|_| compressor(self.options.level)).collect::<Result<Vec<_>, _>>()?;
        thread::scope(|scope| {
            for compressor in &mut compressors {
                scope.spawn(|| compress_jobs(&queue, compressor));
            }
            let reader = scope.spawn(|| self.read_members(members, bases, jobs, steps));
            let mut records = vec![Vec::new(); members.len()];
            let mut done = 0;
            let mut write_one = |step| -> Result<(), WriteError> {
                let failed = |source| WriteError::Write { path: out.to_owned(), source };
                match step {
                    Step::Tar(bytes) => output.tar_bytes(&bytes).map_err(failed),
                    Step::Chunk { member, chunk, frame } => {
                        let frame =
                            frame.recv().unwrap_or_else(|_| Err(io::Error::other("a compressor died")));
                        let frame = frame.map_err(WriteError::Compress)?;
                        records[member].push(output.chunk(chunk, &frame).map_err(failed)?);
                        done += u64::from(frame.plain_len);
                        on_progress(PackProgress { pass: Pass::Compress, done, total });
                        Ok(())
                    }
                }
            };
            // Dropping the receiver on an error stops the reader, and that the compressors.
            let written = in_order.into_iter().try_for_each(&mut write_one);
            let read = reader.join().expect("the reader does not panic");
            written.and(read).map(|()| records)
        })
    }

    /// The reading side: every member's tar header and its chunks, in order.
    fn read_members(
        &self,
        members: &[Member],
        bases: &[BasePack],
        jobs: SyncSender<Job>,
        steps: SyncSender<Step>,
    ) -> Result<(), WriteError> {
        let chunk_size = self.options.chunk_size;
        let mut padding = 0;
        for (position, member) in members.iter().enumerate() {
            let Member { scan, mtime, .. } = member;
            let name = member.tar_name();
            let (head, tar_len) = format::tar_member_head(&name, scan.size, chunk_size, &scan.stored, *mtime);
            let mut tar = vec![0; padding];
            // Behind the manifest, by which a pack is told from other archives.
            if position == 1 && !bases.is_empty() {
                tar.extend(delta::notice(members, bases, chunk_size));
            }
            tar.extend(head);
            padding = format::tar_padding(tar_len);
            if steps.send(Step::Tar(tar)).is_err() {
                return Ok(());
            }
            for (&chunk, len) in scan.stored.iter().zip(self.stored_lens(member)) {
                let mut plain = vec![0; len as usize];
                let read = member.file.read_exact_at(&mut plain, u64::from(chunk) * u64::from(chunk_size));
                read.map_err(|source| WriteError::Read { path: member.path.clone(), source })?;
                let (reply, frame) = channel();
                let queued = jobs.send(Job { plain, reply }).is_ok();
                if !queued || steps.send(Step::Chunk { member: position, chunk, frame }).is_err() {
                    return Ok(());
                }
            }
        }
        // The writing side may be gone, which is its error to tell.
        let _ = steps.send(Step::Tar(vec![0; padding + format::TAR_END]));
        Ok(())
    }

    fn stored_lens<'a>(&self, member: &'a Member) -> impl Iterator<Item = u64> + use<'a> {
        let (size, chunk_size) = (member.scan.size, self.options.chunk_size);
        member.scan.stored.iter().map(move |&chunk| u64::from(format::chunk_len(size, chunk_size, chunk)))
    }
}

fn complete(manifest: Manifest, members: &[Member]) -> Manifest {
    let file = |member: &Member| ManifestFile {
        path: member.name.clone(),
        size: member.scan.size,
        sha256: member.scan.digest,
    };
    Manifest { forkd_pack_version: PACK_VERSION, files: members.iter().map(file).collect(), ..manifest }
}

fn check_unchanged(members: &[Member]) -> Result<(), WriteError> {
    // The first is the manifest, which has no file of its own.
    for member in &members[1..] {
        let now = member.file.metadata();
        let same =
            |now: fs::Metadata| now.len() == member.scan.size && now.mtime().max(0) as u64 == member.mtime;
        if !now.is_ok_and(same) {
            return Err(WriteError::Changed { path: member.path.clone() });
        }
    }
    Ok(())
}
