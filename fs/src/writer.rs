//! Building packs: a directory of files becomes one `.tar.zst` with an index.
//!
//! Two passes: the first digests every file and finds its zero chunks (the manifest, which comes first in the pack,
//! needs the digests, and tar needs the sparse map before the data); the second compresses the rest on all cores.
//! Memory stays at a few chunks a thread. The files must not change meanwhile.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;

use zstd::bulk::Compressor;
use zstd::zstd_safe::CParameter;

use crate::digest::Digest;
use crate::format::{self, DEFAULT_CHUNK_SIZE, MANIFEST, MEMBER_ORDER, PACK_VERSION};
use crate::index::{ChunkRecord, Index};
use crate::manifest::{Manifest, ManifestFile};
use crate::scan::{FileScan, scan};
use crate::store::IndexPin;

mod output;

use output::{Frame, Output};

/// How to build a pack.
#[derive(Debug, Clone, Copy)]
pub struct PackOptions {
    /// Plain bytes in a chunk: a power of two from 64 KiB to 4 MiB.
    pub chunk_size: u32,
    /// zstd level, 1 to 22.
    pub level: i32,
    /// Threads that compress.
    pub threads: usize,
}

impl Default for PackOptions {
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(2, usize::from).max(2);
        Self { chunk_size: DEFAULT_CHUNK_SIZE, level: 3, threads }
    }
}

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
    /// Chunks left out because they are all zeros.
    pub zero_chunks: u32,
    /// Plain bytes of all files.
    pub plain_bytes: u64,
    /// Bytes of the stored chunks' frames.
    pub stored_bytes: u64,
}

impl PackSummary {
    /// How many plain bytes one byte of the pack stands for.
    pub fn ratio(&self) -> f64 {
        self.plain_bytes as f64 / self.pack_size as f64
    }
}

/// How far building has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackProgress {
    /// Which pass.
    pub pass: Pass,
    /// Plain bytes done in this pass.
    pub done: u64,
    /// Plain bytes in this pass.
    pub total: u64,
}

/// The passes over the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Digests and zero chunks.
    Scan,
    /// Compressing what is not zero.
    Compress,
}

/// Why a pack could not be built.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The chunk size is not one the format allows.
    #[error("{chunk_size} is not a chunk size: take a power of two from 65536 to 4194304")]
    ChunkSize {
        /// What was asked for.
        chunk_size: u32,
    },
    /// A file whose name a pack cannot hold, or too many files.
    #[error("{} cannot go into a pack: {reason}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A file changed between the passes.
    #[error("{} changed while it was being packed", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The pack cannot be written.
    #[error("cannot write the pack {}", path.display())]
    Write {
        /// The pack.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// More stored chunks than an index may hold: a larger chunk size helps.
    #[error(
        "the pack would hold {chunks} stored chunks, which is too many for its index; take a larger chunk size"
    )]
    TooManyChunks {
        /// How many.
        chunks: usize,
    },
    /// The compressor refused its level or failed.
    #[error("cannot compress")]
    Compress(#[source] io::Error),
}

/// Builds packs.
#[derive(Debug, Clone, Default)]
pub struct PackWriter {
    options: PackOptions,
}

/// One file on its way into a pack.
struct Member {
    name: String,
    path: PathBuf,
    file: File,
    scan: FileScan,
    mtime: u64,
}

/// What the reading side hands to the writing side, in pack order.
enum Step {
    /// Tar's own bytes.
    Tar(Vec<u8>),
    /// A chunk of a member, being compressed.
    Chunk { member: usize, chunk: u32, frame: Receiver<io::Result<Frame>> },
}

/// A chunk waiting for a thread.
struct Job {
    plain: Vec<u8>,
    reply: Sender<io::Result<Frame>>,
}

type OnProgress<'a> = &'a (dyn Fn(PackProgress) + Sync);

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
        if !format::is_chunk_size(self.options.chunk_size) {
            return Err(WriteError::ChunkSize { chunk_size: self.options.chunk_size });
        }
        let mut members = self.scan_all(dir, on_progress)?;
        let manifest = complete(manifest, &members);
        let text = manifest.to_toml().into_bytes();
        members.insert(0, self.manifest_member(&text, &members, out)?);
        let stored: usize = members.iter().map(|member| member.scan.stored.len()).sum();
        if Index::encoded_len(members.len(), stored) > format::MAX_INDEX_LEN {
            return Err(WriteError::TooManyChunks { chunks: stored });
        }

        let failed = |source| WriteError::Write { path: out.to_owned(), source };
        let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut temporary =
            tempfile::Builder::new().prefix(".forkd-pack-").tempfile_in(parent).map_err(failed)?;
        let mut output = Output::new(temporary.as_file_mut(), self.compressor()?);
        let records = self.compress_all(&members, &mut output, out, on_progress)?;
        let files = members.iter().zip(records);
        let files = files.map(|(member, records)| (member.name.clone(), member.scan.size, records)).collect();
        let (index, pack_size) = output.finish(self.options.chunk_size, files).map_err(failed)?;
        let pack_sha256 = output.close().map_err(failed)?;
        check_unchanged(&members)?;
        temporary.as_file().set_permissions(fs::Permissions::from_mode(0o644)).map_err(failed)?;
        temporary.as_file().sync_all().map_err(failed)?;
        temporary.persist(out).map_err(|error| failed(error.error))?;
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed)?;

        let (index, pin) = index;
        let chunks: u32 = index.files().map(|(file, _)| index.chunk_count(file)).sum();
        Ok(PackSummary {
            pack_size,
            pack_sha256,
            index: pin,
            manifest,
            stored_chunks: index.stored_chunk_count(),
            zero_chunks: chunks - index.stored_chunk_count(),
            plain_bytes: members.iter().map(|member| member.scan.size).sum(),
            stored_bytes: index.stored_bytes(),
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
                        Ok((scan, file)) => Ok(Member { name, path, file, scan, mtime }),
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
        Ok(Member { name: MANIFEST.into(), path: out.to_owned(), file, scan, mtime })
    }

    /// Second pass: writes every member, returns each one's records.
    fn compress_all(
        &self,
        members: &[Member],
        output: &mut Output<'_>,
        out: &Path,
        on_progress: OnProgress<'_>,
    ) -> Result<Vec<Vec<ChunkRecord>>, WriteError> {
        let total = members.iter().flat_map(|member| self.stored_lens(member)).sum();
        let threads = self.options.threads.max(1);
        let (jobs, queue) = sync_channel::<Job>(threads * 2);
        let (steps, in_order) = sync_channel::<Step>(threads * 4);
        let queue = Mutex::new(queue);
        let mut compressors = (0..threads).map(|_| self.compressor()).collect::<Result<Vec<_>, _>>()?;
        thread::scope(|scope| {
            for compressor in &mut compressors {
                scope.spawn(|| compress_jobs(&queue, compressor));
            }
            let reader = scope.spawn(|| self.read_members(members, jobs, steps));
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
        jobs: SyncSender<Job>,
        steps: SyncSender<Step>,
    ) -> Result<(), WriteError> {
        let chunk_size = self.options.chunk_size;
        let mut padding = 0;
        for (position, member) in members.iter().enumerate() {
            let Member { name, scan, mtime, .. } = member;
            let (head, tar_len) = format::tar_member_head(name, scan.size, chunk_size, &scan.stored, *mtime);
            let tar = [vec![0; padding], head].concat();
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

    fn compressor(&self) -> Result<Compressor<'static>, WriteError> {
        let mut compressor = Compressor::new(self.options.level).map_err(WriteError::Compress)?;
        // Lets `zstd -t` find damage; costs four bytes a chunk.
        compressor.set_parameter(CParameter::ChecksumFlag(true)).map_err(WriteError::Compress)?;
        Ok(compressor)
    }
}

/// The files of a directory that go into a pack, in pack order.
fn member_files(dir: &Path) -> Result<Vec<(String, PathBuf)>, WriteError> {
    let failed = |source| WriteError::Read { path: dir.to_owned(), source };
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if name.starts_with('.') || name == MANIFEST {
            continue;
        }
        if !format::is_plain_name(&name) {
            return Err(WriteError::Refused { path, reason: "its name is not a plain file name" });
        }
        if !entry.file_type().map_err(failed)?.is_file() {
            return Err(WriteError::Refused { path, reason: "it is not a regular file" });
        }
        files.push((name.into_owned(), path));
    }
    if files.len() >= format::MAX_FILES as usize {
        return Err(WriteError::Refused { path: dir.to_owned(), reason: "it holds too many files" });
    }
    let rank =
        |name: &str| MEMBER_ORDER.iter().position(|&known| known == name).unwrap_or(MEMBER_ORDER.len());
    files.sort_by(|(a, _), (b, _)| (rank(a), a).cmp(&(rank(b), b)));
    Ok(files)
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

fn compress_jobs(queue: &Mutex<Receiver<Job>>, compressor: &mut Compressor<'static>) {
    loop {
        let job = queue.lock().expect("receiving does not panic").recv();
        let Ok(Job { plain, reply }) = job else { return };
        let frame = compressor.compress(&plain).map(|bytes| Frame {
            digest: Digest::of(&bytes),
            bytes,
            plain_len: plain.len() as u32,
        });
        let _ = reply.send(frame);
    }
}
