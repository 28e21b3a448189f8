//! What the tests of this crate share: packs with known contents, and an HTTP server that misbehaves on request.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use forkd_fs::digest::Digest;
use forkd_fs::format::PACK_VERSION;
use forkd_fs::manifest::{KvmKind, Manifest, Requires};
use forkd_fs::source::{HttpClient, HttpOptions, HttpSource, ReadDeadlines, Source};
use forkd_fs::store::{PackLocation, PackSource, Store, StoreOptions};
use forkd_fs::writer::{PackOptions, PackSummary, PackWriter};

pub mod server;

/// The chunk size of test packs: the smallest, so that small files have many.
pub const CHUNK: usize = 64 << 10;

/// A pack and what it was made of.
pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub pack: PathBuf,
    pub summary: PackSummary,
    /// Plain contents by name, the manifest included.
    pub files: BTreeMap<String, Vec<u8>>,
}

pub fn manifest() -> Manifest {
    Manifest {
        forkd_pack_version: PACK_VERSION,
        tag: "test".into(),
        description: "a test pack".into(),
        base_image: "none".into(),
        created_at: "2026-01-01T00:00:00Z".into(),
        forkd_version: "0.0.0".into(),
        requires: Requires {
            memory_mib: 4,
            vcpus: 1,
            kvm_kind: KvmKind::Pvm,
            kernel: "6.12".into(),
            vmstate_version: 1,
            cpu_features: vec!["sse2".into()],
            cpu_vendor: String::new(),
        },
        files: Vec::new(),
        probe: None,
    }
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; len];
    rng.fill(&mut bytes);
    bytes
}

/// Bytes that compress about two to one.
pub fn text(seed: u64, len: usize) -> Vec<u8> {
    noise(seed, len).into_iter().map(|byte| b'a' + byte % 16).collect()
}

/// A memory image of `chunks` chunks and a bit: zeros, holes, text and noise by turns.
pub fn memory(chunks: usize) -> Vec<u8> {
    let mut image = vec![0; chunks * CHUNK + 4096];
    for chunk in 0..chunks {
        let range = chunk * CHUNK..(chunk + 1) * CHUNK;
        match chunk % 5 {
            0 | 1 => {}
            2 => image[range].copy_from_slice(&noise(chunk as u64, CHUNK)),
            3 => image[range.start + 100] = 1,
            _ => image[range].copy_from_slice(&text(chunk as u64, CHUNK)),
        }
    }
    image
}

impl Fixture {
    /// A pack with every member, holes in memory.bin and none in rootfs.erofs.
    pub fn new() -> Self {
        Self::with(&[
            ("snapshot.json", br#"{"vcpus":1}"#.to_vec()),
            ("vmstate", text(1, 30_000)),
            ("trace", Vec::new()),
            ("memory.bin", memory(40)),
            ("rootfs.erofs", text(2, 5 * CHUNK + 17)),
        ])
    }

    pub fn with(files: &[(&str, Vec<u8>)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("snapshot");
        std::fs::create_dir(&from).unwrap();
        for (name, contents) in files {
            write_sparse(&from.join(name), contents);
        }
        let pack = dir.path().join("test.forkd-snapshot.tar.zst");
        let options = PackOptions { chunk_size: CHUNK as u32, level: 1, threads: 2 };
        let summary = PackWriter::new(options).write(&from, manifest(), &pack, &|_| ()).unwrap();
        let mut files: BTreeMap<_, _> =
            files.iter().map(|(name, plain)| (name.to_string(), plain.clone())).collect();
        files.insert("manifest.toml".into(), summary.manifest.to_toml().into_bytes());
        Self { dir, pack, summary, files }
    }

    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.pack).unwrap()
    }

    /// The pack at `url`, pinned as a registry would.
    pub fn pinned(&self, url: String) -> PackLocation {
        let (size, index) = (Some(self.summary.pack_size), Some(self.summary.index));
        PackLocation { source: PackSource::Url(url), size, index }
    }

    /// The pack as a local file.
    pub fn local(&self) -> PackLocation {
        PackLocation { source: PackSource::Path(self.pack.clone()), size: None, index: None }
    }

    /// Every byte of every file read through `store` is the original.
    pub async fn check_all(&self, store: &Arc<Store>) {
        for (file, entry) in store.index().files() {
            let plain = store.read(file, 0, entry.size).await.unwrap();
            assert_eq!(Digest::of(&plain), Digest::of(&self.files[&entry.name]), "{}", entry.name);
        }
    }
}

/// Writes a file with zero chunks as holes where they are a multiple of 4 KiB.
pub fn write_sparse(path: &Path, contents: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(contents.len() as u64).unwrap();
    for (number, page) in contents.chunks(4096).enumerate() {
        if page.iter().any(|&byte| byte != 0) {
            file.write_all_at(page, number as u64 * 4096).unwrap();
        }
    }
}

/// Timeouts short enough for tests: nothing waits longer than half a second for a silent server.
pub fn http_options() -> HttpOptions {
    HttpOptions {
        connect_timeout: Duration::from_millis(500),
        idle_timeout: Duration::from_millis(200),
        document_deadline: Duration::from_millis(800),
        ..HttpOptions::default()
    }
}

pub fn http() -> HttpClient {
    HttpClient::new(http_options())
}

/// An object to read ranges of.
pub fn source(http: &HttpClient, url: &str, size: Option<u64>) -> Source {
    let deadline = options().demand_deadline;
    Source::Http(
        HttpSource::new(http, url, size, ReadDeadlines { demand: deadline, prefetch: deadline }).unwrap(),
    )
}

pub fn options() -> StoreOptions {
    let deadline = Duration::from_millis(1500);
    StoreOptions {
        http: http(),
        demand_deadline: deadline,
        prefetch_deadline: deadline,
        ..StoreOptions::default()
    }
}

/// Runs mkfs.erofs over a directory.
pub fn mkfs(tree: &Path, args: &[&str]) -> Vec<u8> {
    let out = tempfile::NamedTempFile::new().unwrap();
    let made = Command::new("mkfs.erofs").arg("--quiet").args(args).arg(out.path()).arg(tree).output();
    let made = made.expect("mkfs.erofs (erofs-utils) is there");
    assert!(made.status.success(), "{args:?}: {}", String::from_utf8_lossy(&made.stderr));
    fs::read(out.path()).unwrap()
}
