//! What every fuzz target does with its bytes: the parsers of everything that comes from outside, and what is then done
//! with their results. Shared by the targets here (libFuzzer, nightly) and by `tests/corpus.rs` (stable, in the gate).
//!
//! A parser may refuse anything; it may not panic, run for long, or spend memory out of proportion to its input. Where
//! a digest or a length would stop random bytes at the door, the bytes are tried a second time with that mended, so
//! that what lies behind is tested too.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use bytes::Bytes;
use forkd_engine::hub::registry::{HubAddress, Registry, RegistryCopies};
use forkd_engine::local::paths::Paths;
use forkd_fs::digest::Digest;
use forkd_fs::erofs::{ErofsImage, ReadImage};
use forkd_fs::format::{self, MAX_NAME_LEN};
use forkd_fs::index::{ChunkId, Index, TRAILER_LEN};
use forkd_fs::legacy;
use forkd_fs::manifest::Manifest;
use forkd_fs::source::HttpClient;
use forkd_fs::store::{PackLocation, PackSource, Store, StoreOptions};
use forkd_fs::trace::Trace;
use forkd_vmm::pvm::instruction::{LONGEST, XsaveInstruction, XsaveOperation};
use forkd_vmm::pvm::xsave::{self, XsaveOutcome, XsaveRegisters};
use forkd_vmm::pvm::xsave_area::{XsaveLayout, amd_leaf};
use forkd_vmm::vmstate::{MachineState, VERSION as VMSTATE_VERSION};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use sha2::{Digest as _, Sha256};
use tokio::runtime::Runtime;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

/// A target by its name.
pub type Check = fn(&[u8]);

/// Every target.
pub const CHECKS: [(&str, Check); 9] = [
    ("index", index),
    ("manifest", manifest),
    ("registry", registry),
    ("trace", trace),
    ("vmstate", vmstate),
    ("legacy", legacy),
    ("pack", pack),
    ("erofs", erofs),
    ("xsave", xsave),
];

/// Most plain bytes a predecessor's pack may hold here.
const LEGACY_LIMIT: u64 = 1 << 20;
/// Packs that claim to hold more plain bytes are opened and looked at, not unpacked: that alone takes time, as it may.
const UNPACK_LIMIT: u64 = 8 << 20;

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime"));

/// The index of a pack.
pub fn index(bytes: &[u8]) {
    for pack_size in [None, Some(bytes.len() as u64)] {
        if let Ok(index) = Index::parse(bytes, pack_size) {
            use_index(&index, bytes.len());
        }
    }
    if let Ok(index) = Index::parse(&with_index_lengths(bytes), None) {
        use_index(&index, bytes.len());
    }
    let _ = Index::parse_trailer(bytes);
}

fn use_index(index: &Index, len: usize) {
    assert!(index.stored_chunk_count() as usize * 48 <= len, "more records than bytes");
    let mut end = 0;
    for (file, entry) in index.files() {
        assert!(format::is_plain_name(&entry.name));
        assert_eq!(index.file(&entry.name), Some(file), "a name leads back to its file");
        for (id, record) in index.stored_chunks(file) {
            assert!(index.plain_len(id) > 0 && !index.is_zero(id));
            let frame_end = record.offset + u64::from(record.length);
            match record.pack.checked_sub(1) {
                Some(base) => assert!(frame_end <= index.bases()[usize::from(base)].index.offset),
                None => {
                    assert!(record.offset >= end);
                    end = frame_end;
                }
            }
            assert_eq!(index.record(id), Some(record));
        }
        for offset in [0, 1, entry.size / 2, entry.size.saturating_sub(1), entry.size, u64::MAX] {
            let spans = index.spans(file, offset, 3 << 20);
            let total: u64 = spans.map(|span| u64::from(span.len)).sum();
            assert_eq!(total, entry.size.saturating_sub(offset).min(3 << 20));
        }
        let stats = index.stats(file);
        assert!(stats.stored_chunks <= stats.chunks);
        let _ = index.is_zero(ChunkId { file, chunk: u32::MAX });
    }
    assert!(end <= index.pack_size() && index.bases().len() <= format::MAX_BASES);
    let held: u32 = (0..=index.bases().len() as u8).map(|pack| index.held_by(pack).0).sum();
    assert_eq!(held, index.stored_chunk_count());
}

/// Lengths of an index's parts: what is before its tables, and one entry of each of them.
const HEAD: usize = 48;
const BASE: usize = 256;
const FILE: usize = MAX_NAME_LEN + 16;
const RECORD: usize = 48;

/// The same bytes with every length and count of an index mended.
fn with_index_lengths(bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    if out.len() < HEAD + TRAILER_LEN {
        return out;
    }
    let is_delta = out[20] & format::FLAG_DELTA as u8 != 0;
    let mut tables = out.len() - HEAD - TRAILER_LEN;
    let bases = if is_delta { (out[36] as usize % 10).min(tables / BASE) } else { 0 };
    tables -= bases * BASE;
    let files = (out[28] as usize % 8).min(tables / FILE);
    let records = (tables - files * FILE) / RECORD;
    out.truncate(HEAD + bases * BASE + files * FILE + records * RECORD + TRAILER_LEN);
    let len = out.len();
    let mut put = |at: usize, value: u32| out[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(0, format::INDEX_FRAME_MAGIC);
    put(4, len as u32 - 8);
    put(28, files as u32);
    put(32, records as u32);
    put(36, bases as u32);
    put(len - 16, len as u32);
    put(len - 12, format::PACK_VERSION);
    out[8..16].copy_from_slice(b"FORKDIDX");
    out[len - 8..].copy_from_slice(b"FORKDEND");
    out
}

/// manifest.toml.
pub fn manifest(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::parse(bytes) {
        let text = manifest.to_toml();
        assert_eq!(Manifest::parse(text.as_bytes()).expect("what is written can be read"), manifest);
    }
}

/// registry.json, with everything its entries lead to.
pub fn registry(bytes: &[u8]) {
    let Ok(parsed) = Registry::parse(bytes, "fuzz") else { return };
    let text = serde_json::to_vec(&parsed).expect("maps with text keys serialise");
    assert_eq!(Registry::parse(&text, "fuzz").expect("what is written can be read"), parsed);
    let (file, path) = memory_file(bytes);
    // A registry on disk is not copied.
    let copies = RegistryCopies::new(&Paths { data: "".into(), cache: "".into(), runtime: "".into() });
    let loaded = RUNTIME.block_on(HubAddress::Path(path).load(&HttpClient::default(), &copies));
    let catalogue = loaded.expect("parsed before");
    for entry in catalogue.entries().flatten() {
        assert!(format::is_plain_name(&entry.reference.version));
        let again = catalogue.resolve(&entry.reference).expect("a listed entry resolves");
        assert_eq!(again.location, entry.location);
    }
    drop(file);
}

/// An image in memory.
struct InMemory<'a>(&'a [u8]);

impl ReadImage for InMemory<'_> {
    type Error = std::convert::Infallible;

    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    async fn read(&self, offset: u64, len: u64) -> Result<Bytes, Self::Error> {
        Ok(Bytes::copy_from_slice(&self.0[offset as usize..(offset + len) as usize]))
    }
}

/// A root disk: every name that can be reached, and the beginning of what it names.
pub fn erofs(bytes: &[u8]) {
    RUNTIME.block_on(async {
        let Ok(image) = ErofsImage::open(InMemory(bytes)).await else { return };
        let Ok(root) = image.node(image.root()).await else { return };
        let (mut directories, mut seen) = (vec![root], 0);
        // Many names of one directory below one parent are allowed; looking into it once is enough.
        let mut visited = std::collections::BTreeSet::new();
        while let Some(directory) = directories.pop() {
            let mut position = 0;
            while let Ok(entries) = image.entries_from(&directory, position).await {
                let Some(last) = entries.last() else { break };
                assert!(last.next > position, "listing goes on");
                position = last.next;
                for entry in entries {
                    seen += 1;
                    assert!(seen <= 100_000, "an image of {} bytes has no end", bytes.len());
                    let Ok(Some(node)) = image.lookup(&directory, &entry.name).await else { continue };
                    for offset in [0, 5000, node.size.saturating_sub(10)] {
                        if let Ok(read) = image.read(&node, offset, 10_000).await {
                            assert_eq!(read.len() as u64, node.size.saturating_sub(offset).min(10_000));
                        }
                    }
                    if node.is_symlink() {
                        let _ = image.link_target(&node).await;
                    }
                    if node.is_directory() && visited.insert(entry.nid) {
                        directories.push(node);
                    }
                }
            }
        }
    });
}

/// The trace of first touches.
pub fn trace(bytes: &[u8]) {
    if let Ok(trace) = Trace::decode(bytes) {
        // Written anew it may be longer than what may be read: numbers have more than one spelling in postcard.
        if let Ok(again) = trace.encode() {
            assert_eq!(Trace::decode(&again), Ok(trace.clone()));
        }
        let _ = trace.page_count();
        assert!(trace.pages().take(10_000).count() as u64 <= trace.page_count());
    }
}

/// The state of a machine.
pub fn vmstate(bytes: &[u8]) {
    if let Ok(state) = MachineState::decode(bytes) {
        let again = state.encode().expect("what was read can be written");
        assert_eq!(MachineState::decode(&again).expect("and read").encode().expect("again"), again);
    }
    const HEADER: usize = 48;
    if bytes.len() < HEADER {
        return;
    }
    let mut mended = bytes.to_vec();
    mended[..8].copy_from_slice(b"FORKDVM1");
    mended[8..12].copy_from_slice(&VMSTATE_VERSION.to_le_bytes());
    mended[12..16].copy_from_slice(&(bytes.len() as u32 - HEADER as u32).to_le_bytes());
    let digest = Sha256::digest(&bytes[HEADER..]);
    mended[16..HEADER].copy_from_slice(&digest);
    if let Ok(state) = MachineState::decode(&mended) {
        let _ = state.encode();
    }
}

/// XSAVE and XRSTOR of a guest whose registers and memory are the bytes: eight numbers, the instruction, and RAM from
/// its first byte on, where its page tables and areas lie.
pub fn xsave(bytes: &[u8]) {
    const RAM: usize = 64 << 10;
    const NUMBERS: usize = 8 * 8;
    let mut head = [0; NUMBERS + LONGEST];
    let known = bytes.len().min(head.len());
    head[..known].copy_from_slice(&bytes[..known]);
    let number = |at: usize| u64::from_le_bytes(*head[at * 8..].first_chunk().expect("eight numbers"));
    let mut memory = bytes.get(head.len()..).unwrap_or_default().to_vec();
    memory.resize(RAM, 0);
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).expect("memory is enough");
    ram.write_slice(&memory, GuestAddress(0)).expect("it fits");

    let general =
        kvm_regs { rax: number(0), rdx: number(1), rdi: number(2), rflags: number(3), ..Default::default() };
    let ss = kvm_segment { dpl: (number(7) >> 32) as u8 & 3, ..Default::default() };
    let special = kvm_sregs { cr0: number(3), cr3: number(4), cr4: number(5), ss, ..Default::default() };
    let instruction = XsaveInstruction::decode(&head[NUMBERS..], &general).unwrap_or(XsaveInstruction {
        operation: if number(0) & 8 == 0 { XsaveOperation::Save } else { XsaveOperation::Restore },
        wide: true,
        address: number(2),
        length: 4,
    });
    assert!((3..=LONGEST).contains(&instruction.length));
    let layout = XsaveLayout::new(amd_leaf);
    let mut state = vec![0x5a; number(7) as usize % 4097];
    let before = state.clone();
    let registers = XsaveRegisters { general: &general, special: &special, xcr0: number(6) };
    let outcome = xsave::execute(&instruction, registers, &ram, &layout, &mut state);
    let done = outcome == Ok(XsaveOutcome::Done);
    if !(done && instruction.operation == XsaveOperation::Save) {
        let mut after = vec![0; RAM];
        ram.read_slice(&mut after, GuestAddress(0)).expect("it is there");
        // A walk marks entries of tables as accessed and dirty, and changes nothing else.
        const MARKS: u64 = 1 << 5 | 1 << 6;
        let word = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
        let pairs = memory.as_chunks().0.iter().zip(after.as_chunks().0);
        assert!(pairs.map(|(old, new)| word(old) ^ word(new)).all(|changed| changed & !MARKS == 0));
    }
    assert!(done || state == before, "what was not done has changed the state");
}

/// A pack of the predecessor: a tar in zstd. Tried as it is, and compressed, so that headers of tar can be anything.
pub fn legacy(bytes: &[u8]) {
    for candidate in [bytes.to_vec(), zstd::bulk::compress(bytes, 1).expect("memory is enough")] {
        let (file, path) = memory_file(&candidate);
        if let Ok(pack) = legacy::list(&path, LEGACY_LIMIT) {
            assert!(pack.members.iter().map(|member| member.size).sum::<u64>() <= LEGACY_LIMIT);
        }
        let dest = tempfile::tempdir_in(memory_dir()).expect("a directory");
        let _ = legacy::unpack(&path, dest.path(), LEGACY_LIMIT);
        assert!(bytes_below(dest.path()) <= LEGACY_LIMIT);
        drop(file);
    }
}

/// A whole pack: found, opened, read, unpacked; as it is, and with its index vouching for whatever the frames are.
pub fn pack(bytes: &[u8]) {
    RUNTIME.block_on(open_pack(bytes));
    if let Some(mended) = with_frame_digests(bytes) {
        RUNTIME.block_on(open_pack(&mended));
    }
}

async fn open_pack(bytes: &[u8]) {
    // What a delta says about where its base is, is not to be asked for.
    if bytes.windows(3).any(|text| text == b"://") {
        return;
    }
    let (file, path) = memory_file(bytes);
    let location = PackLocation { source: PackSource::Path(path), size: None, index: None };
    let options =
        StoreOptions { decoded_bytes: 1 << 20, open_without_bases: true, ..StoreOptions::default() };
    let Ok(store) = Store::open(location, options).await else { return };
    let plain: u64 = store.index().files().map(|(_, entry)| entry.size).sum();
    for (id, entry) in store.index().files() {
        for offset in [0, entry.size / 2, entry.size.saturating_sub(1)] {
            if let Ok(read) = store.read(id, offset, 4096).await {
                assert_eq!(read.len() as u64, entry.size.saturating_sub(offset).min(4096));
            }
        }
    }
    let _ = store.manifest().await;
    if plain <= UNPACK_LIMIT {
        let dest = tempfile::tempdir_in(memory_dir()).expect("a directory");
        if forkd_fs::unpack::unpack(&store, dest.path(), &|_| ()).await.is_ok() {
            assert_eq!(bytes_below(dest.path()), plain);
        }
        assert!(bytes_below(dest.path()) <= plain);
    }
    drop(file);
}

/// The same pack with the digests in its index computed from its frames, when it has an index at all.
fn with_frame_digests(bytes: &[u8]) -> Option<Vec<u8>> {
    let count = u32::from_le_bytes(bytes.get(bytes.len().checked_sub(9)?..)?[..4].try_into().ok()?);
    let index_end = bytes.len().checked_sub(17 + count as usize * 8)?;
    let length = Index::parse_trailer(bytes.get(index_end.checked_sub(TRAILER_LEN)?..index_end)?).ok()?;
    let start = index_end.checked_sub(length as usize)?;
    let index = Index::parse(&bytes[start..index_end], Some(bytes.len() as u64)).ok()?;
    let mut out = bytes.to_vec();
    let mut at = start + HEAD + index.bases().len() * BASE + index.files().len() * FILE;
    for (file, _) in index.files() {
        for (_, record) in index.stored_chunks(file) {
            if record.pack != 0 {
                at += RECORD;
                continue;
            }
            let frame = &bytes[record.offset as usize..record.offset as usize + record.length as usize];
            out[at + 16..at + RECORD].copy_from_slice(&Digest::of(frame).0);
            at += RECORD;
        }
    }
    Some(out)
}

/// A file with these bytes that lives in memory, and a path to it.
fn memory_file(bytes: &[u8]) -> (std::fs::File, PathBuf) {
    let descriptor = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    let mut file = std::fs::File::from(descriptor);
    file.write_all(bytes).expect("memory is enough");
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    (file, path.into())
}

/// A directory in memory, when there is one: thousands of small files are written.
fn memory_dir() -> PathBuf {
    let shared = Path::new("/dev/shm");
    if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() }
}

fn bytes_below(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let len = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.map(len).sum()
}
