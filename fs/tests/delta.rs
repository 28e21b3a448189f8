//! Deltas: packed against packs, read through them, and refused when what they build on is not what they name.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use bytes::Bytes;
use forkd_fs::cache::{CacheOptions, ChunkCache};
use forkd_fs::digest::Digest;
use forkd_fs::format::MAX_BASES;
use forkd_fs::index::{BasePack, ChunkId};
use forkd_fs::store::{
    ChunkData, FindBase, OpenError, PackLocation, PackSource, Places, ReadError, Store, StoreOptions,
};
use forkd_fs::writer::{DeltaBase, PackOptions, PackSummary, PackWriter, WriteError};
use support::server::Server;
use support::{CHUNK, manifest, memory, noise, options, text, write_sparse};
use tokio::runtime::{Handle, Runtime};

/// A machine that changes, and a directory for its packs.
struct Machine {
    dir: tempfile::TempDir,
    memory: Vec<u8>,
    moment: u8,
}

fn at(path: &Path) -> PackLocation {
    PackLocation { source: PackSource::Path(path.to_owned()), size: None, index: None }
}

fn writer(level: i32) -> PackWriter {
    PackWriter::new(PackOptions { chunk_size: CHUNK as u32, level, threads: 2 })
}

impl Machine {
    fn new() -> Machine {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("snapshot")).unwrap();
        let machine = Machine { dir, memory: memory(40), moment: 0 };
        write_sparse(&machine.snapshot().join("rootfs.erofs"), &text(2, 5 * CHUNK + 17));
        machine.store();
        machine
    }

    fn snapshot(&self) -> PathBuf {
        self.dir.path().join("snapshot")
    }

    fn pack(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn store(&self) {
        write_sparse(&self.snapshot().join("memory.bin"), &self.memory);
        fs::write(self.snapshot().join("vmstate"), text(u64::from(self.moment), 3000)).unwrap();
        fs::write(self.snapshot().join("snapshot.json"), b"{}").unwrap();
    }

    /// The machine goes on: each of `chunks` gets a new page.
    fn go_on(&mut self, chunks: &[usize]) {
        self.moment += 1;
        for &chunk in chunks {
            let page = noise(1000 * u64::from(self.moment) + chunk as u64, 4096);
            self.memory[chunk * CHUNK + 8192..][..4096].copy_from_slice(&page);
        }
        self.store();
    }

    fn whole(&self, name: &str) -> PackSummary {
        writer(1).write(&self.snapshot(), manifest(), &self.pack(name), &|_| ()).unwrap()
    }

    fn delta(&self, name: &str, base: &str) -> PackSummary {
        self.delta_at(name, &self.pack(base), base, 1).unwrap()
    }

    fn delta_at(&self, name: &str, base: &Path, hint: &str, level: i32) -> Result<PackSummary, WriteError> {
        let runtime = Runtime::new().unwrap();
        let store = runtime.block_on(Store::open(at(base), lenient())).unwrap();
        let read = |id: ChunkId| -> Result<Bytes, ReadError> {
            match runtime.block_on(store.chunk(id))? {
                ChunkData::Data(plain) => Ok(plain),
                ChunkData::Zero => Ok(vec![0; store.index().plain_len(id) as usize].into()),
            }
        };
        let pack = BasePack::new(store.index_pin(), store.index().pack_size(), hint);
        let base = DeltaBase { index: store.index(), pack, read: &read };
        writer(level).write_delta(&self.snapshot(), manifest(), &base, &self.pack(name), &|_| ())
    }

    /// Every byte of every file of the pack is the machine's.
    async fn check(&self, store: &Arc<Store>) {
        for (file, entry) in store.index().files().filter(|(_, entry)| entry.name != "manifest.toml") {
            let plain = store.read(file, 0, entry.size).await.unwrap();
            let expected = fs::read(self.snapshot().join(&entry.name)).unwrap();
            assert_eq!(Digest::of(&plain), Digest::of(&expected), "{}", entry.name);
        }
        let (name, dest) = (store.location().to_owned(), tempfile::tempdir().unwrap());
        forkd_fs::unpack::unpack(store, dest.path(), &|_| ())
            .await
            .unwrap_or_else(|e| panic!("{name}: {e:?}"));
        for name in ["memory.bin", "rootfs.erofs", "vmstate"] {
            assert!(
                fs::read(dest.path().join(name)).unwrap() == fs::read(self.snapshot().join(name)).unwrap()
            );
        }
    }
}

fn lenient() -> StoreOptions {
    StoreOptions { open_without_bases: true, ..options() }
}

/// A registry.
#[derive(Debug)]
struct Listed(Vec<PackLocation>);

impl FindBase for Listed {
    fn find<'a>(&'a self, _: &'a BasePack) -> Places<'a> {
        Box::pin(async { self.0.clone() })
    }
}

#[test]
fn a_delta_holds_what_differs_and_reads_as_the_whole() {
    let mut machine = Machine::new();
    let whole = machine.whole("base");
    machine.go_on(&[2, 12, 30]);
    let delta = machine.delta("delta", "base");
    // vmstate, snapshot.json and the manifest are always its own.
    assert_eq!((delta.stored_chunks, delta.bases.len()), (3 + 3, 1));
    assert_eq!(delta.bases[0].index, whole.index);
    // Chunk 30 was zero before.
    assert_eq!(delta.base_chunks, whole.stored_chunks - 3 - 2);
    assert!(delta.pack_size < whole.pack_size / 2, "{} of {}", delta.pack_size, whole.pack_size);
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let store = Store::open(at(&machine.pack("delta")), options()).await.unwrap();
        assert!(
            store.index().is_delta()
                && !store.is_in_head(ChunkId { file: store.index().file("memory.bin").unwrap(), chunk: 4 })
        );
        machine.check(&store).await;
        let progress = store.progress();
        assert_eq!(progress.chunks_fetched, progress.chunks_total);
        // The same as a pack of the whole, but for the manifest's place.
        machine.whole("again");
        let again = Store::open(at(&machine.pack("again")), options()).await.unwrap();
        let digests = |store: &Store| -> Vec<_> {
            let chunks = store.index().files().flat_map(|(file, _)| store.index().stored_chunks(file));
            chunks.map(|(id, record)| (id, record.digest)).collect()
        };
        assert_eq!(digests(&store), digests(&again));
    });
}

#[test]
fn a_chain_reads_as_the_whole_and_never_names_more_packs_than_it_may() {
    let mut machine = Machine::new();
    machine.whole("0");
    // Every moment leaves something that the later ones keep.
    for moment in 1..=MAX_BASES + 2 {
        machine.go_on(&[moment, 20, 39 - moment % 3]);
        let name = moment.to_string();
        let summary = machine.delta(&name, &(moment - 1).to_string());
        assert_eq!(summary.bases.len(), moment.min(MAX_BASES), "delta {moment}");
        let base = &summary.bases[0];
        assert_eq!(base.hint, (moment - 1).to_string());
        let runtime = Runtime::new().unwrap();
        runtime.block_on(async {
            let store = Store::open(at(&machine.pack(&name)), options()).await.unwrap();
            machine.check(&store).await;
        });
    }
}

#[test]
fn a_base_compressed_otherwise_is_compared_byte_by_byte() {
    let mut machine = Machine::new();
    let whole = machine.whole("base");
    machine.go_on(&[4]);
    let delta = machine.delta_at("delta", &machine.pack("base"), "base", 19).unwrap();
    assert_eq!(delta.base_chunks, whole.stored_chunks - 3 - 1);
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        machine.check(&Store::open(at(&machine.pack("delta")), options()).await.unwrap()).await;
    });
}

#[test]
fn a_base_of_another_geometry_is_refused_or_shares_what_it_can() {
    let mut machine = Machine::new();
    machine.whole("base");
    let larger = PackWriter::new(PackOptions { chunk_size: 2 * CHUNK as u32, level: 1, threads: 2 });
    larger.write(&machine.snapshot(), manifest(), &machine.pack("coarse"), &|_| ()).unwrap();
    let refused = machine.delta_at("delta", &machine.pack("coarse"), "coarse", 1);
    assert!(
        matches!(refused, Err(WriteError::BaseChunkSize { chunk_size: 65536, base: 131072 })),
        "{refused:?}"
    );
    assert!(!machine.pack("delta").exists());
    // A machine with more memory still shares the rest.
    machine.memory.resize(50 * CHUNK, 0);
    machine.go_on(&[45]);
    let delta = machine.delta("delta", "base");
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        machine.check(&Store::open(at(&machine.pack("delta")), options()).await.unwrap()).await;
    });
    assert!(delta.base_chunks > 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn bases_are_found_beside_on_another_host_in_the_cache_or_nowhere() {
    let (machine, base) = tokio::task::spawn_blocking(|| {
        let mut machine = Machine::new();
        let base = machine.whole("base");
        machine.go_on(&[2, 3]);
        machine.delta("delta", "base");
        (machine, base)
    })
    .await
    .unwrap();
    let (delta, base_file) = (machine.pack("delta"), machine.pack("base"));
    let away = machine.pack("away");
    fs::rename(&base_file, &away).unwrap();
    let refused = Store::open(at(&delta), options()).await.unwrap_err();
    let OpenError::NoBase { base: missing, hint, .. } = &refused else { panic!("{refused:?}") };
    assert_eq!((*missing, hint.as_str()), (base.index.sha256, "base"));
    // A registry that pins it, at another host.
    let server = Server::start(fs::read(&away).unwrap()).await;
    let pinned = PackLocation {
        source: PackSource::Url(server.url()),
        size: Some(base.pack_size),
        index: Some(base.index),
    };
    let cache = tempfile::tempdir().unwrap();
    let with = |places: Vec<PackLocation>| StoreOptions {
        bases: Some(Arc::new(Listed(places))),
        cache: Some(Arc::new(ChunkCache::open(cache.path(), CacheOptions::default()))),
        ..options()
    };
    // The first place has nothing, the second another pack.
    let other = PackLocation { source: PackSource::Path(delta.clone()), size: None, index: None };
    let gone = PackLocation { source: PackSource::Path("/nonexistent".into()), size: None, index: None };
    let store = Store::open(at(&delta), with(vec![gone.clone(), other.clone(), pinned])).await.unwrap();
    assert_eq!(server.request_count(), 0, "a registry's pin is believed");
    machine.check(&store).await;
    store.flush_cache();
    drop(server);
    // Without the host: all that is needed of the base is in the cache, and nothing of the delta itself.
    let offline = Store::open(at(&delta), with(vec![gone])).await.unwrap();
    machine.check(&offline).await;
    assert_eq!(offline.base_locations(), [None]);
    // Nowhere, and with another pack in its place.
    fs::remove_dir_all(cache.path().join("chunks")).unwrap();
    let refused = Store::open(at(&delta), with(vec![other])).await.unwrap_err();
    assert!(matches!(refused, OpenError::BaseReplaced { .. }), "{refused:?}");
    let opened = Store::open(at(&delta), lenient()).await.unwrap();
    let memory = opened.index().file("memory.bin").unwrap();
    assert!(matches!(opened.chunk(ChunkId { file: memory, chunk: 4 }).await, Err(ReadError::NoBase { .. })));
    opened.chunk(ChunkId { file: memory, chunk: 2 }).await.unwrap();
    opened.manifest().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_on_the_web_is_found_by_what_the_delta_says() {
    let mut machine = Machine::new();
    let (machine, server) = {
        let handle = Handle::current();
        tokio::task::spawn_blocking(move || {
            machine.whole("base");
            let server = handle.block_on(Server::start(fs::read(machine.pack("base")).unwrap()));
            machine.go_on(&[2, 3]);
            machine.delta_at("delta", &machine.pack("base"), &server.url(), 1).unwrap();
            (machine, server)
        })
        .await
        .unwrap()
    };
    let delta = fs::read(machine.pack("delta")).unwrap();
    let delta_server = Server::start(delta).await;
    let location = PackLocation { source: PackSource::Url(delta_server.url()), size: None, index: None };
    let store = Store::open(location, options()).await.unwrap();
    assert!(server.request_count() >= 1, "its index is compared with the digest");
    machine.check(&store).await;
}

#[test]
fn a_base_that_was_replaced_is_refused_and_a_damaged_one_noticed() {
    let mut machine = Machine::new();
    machine.whole("base");
    let kept = fs::read(machine.pack("base")).unwrap();
    machine.go_on(&[2]);
    machine.delta("delta", "base");
    machine.go_on(&[4, 14]);
    machine.whole("base");
    let runtime = Runtime::new().unwrap();
    let open = || runtime.block_on(Store::open(at(&machine.pack("delta")), options()));
    let refused = open().unwrap_err();
    assert!(
        matches!(&refused, OpenError::BaseReplaced { place, .. } if place.ends_with("base")),
        "{refused:?}"
    );
    // Shorter than where its index should be, and empty.
    for bytes in [&kept[..kept.len() / 2], &[]] {
        fs::write(machine.pack("base"), bytes).unwrap();
        let refused = open().unwrap_err();
        assert!(matches!(refused, OpenError::BaseReplaced { .. }), "{refused:?}");
    }
    // The index as it was, and a frame that is not.
    let mut damaged = kept.clone();
    fs::write(machine.pack("base"), &kept).unwrap();
    let store = open().unwrap();
    let memory = store.index().file("memory.bin").unwrap();
    let id = ChunkId { file: memory, chunk: 4 };
    damaged[store.index().record(id).unwrap().offset as usize + 50] ^= 1;
    fs::write(machine.pack("base"), &damaged).unwrap();
    let store = open().unwrap();
    let read = runtime.block_on(store.chunk(id));
    let base = machine.pack("base").display().to_string();
    assert!(matches!(&read, Err(ReadError::Corrupt { location, .. }) if *location == base), "{read:?}");
}

#[test]
fn any_cut_or_flip_of_a_delta_is_refused_or_reads_right() {
    let mut machine = Machine::new();
    machine.whole("base");
    machine.go_on(&[2]);
    machine.delta("delta", "base");
    let whole = fs::read(machine.pack("delta")).unwrap();
    let runtime = Runtime::new().unwrap();
    let base = fs::read(machine.pack("base")).unwrap();
    for step in 0..120 {
        let mut bytes = whole.clone();
        match step % 3 {
            0 => bytes.truncate(whole.len() * step / 120),
            _ => bytes[whole.len() * step / 120] ^= 1 << (step % 8),
        }
        fs::write(machine.pack("delta"), &bytes).unwrap();
        runtime.block_on(async {
            let Ok(store) = Store::open(at(&machine.pack("delta")), options()).await else { return };
            let Some(memory) = store.index().file("memory.bin") else { return };
            // Nobody pinned the index, so what it says may have changed; a frame that it does not vouch for is not.
            for chunk in 0..store.index().chunk_count(memory).min(64) {
                let id = ChunkId { file: memory, chunk };
                if let (Some(record), Ok(ChunkData::Data(plain))) =
                    (store.index().record(id), store.chunk(id).await)
                {
                    let holder = if record.pack == 0 { &bytes } else { &base };
                    let frame = &holder[record.offset as usize..][..record.length as usize];
                    assert_eq!(Digest::of(frame), record.digest);
                    assert_eq!(plain.len(), store.index().plain_len(id) as usize);
                }
            }
        });
    }
}

#[test]
fn tar_says_what_is_missing_and_gives_no_file_that_passes_for_whole() {
    let mut machine = Machine::new();
    let base = machine.whole("base");
    machine.go_on(&[2]);
    machine.delta("delta", "base");
    let out = tempfile::tempdir().unwrap();
    let mut tar = Command::new("tar");
    let run =
        tar.args(["--zstd", "-xf"]).arg(machine.pack("delta")).arg("-C").arg(out.path()).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let notice = fs::read_to_string(out.path().join("DELTA.txt")).unwrap();
    assert!(
        notice.contains(&base.index.sha256.to_string()) && notice.contains("memory.bin.delta"),
        "{notice}"
    );
    assert!(!out.path().join("memory.bin").exists() && !out.path().join("rootfs.erofs").exists());
    let incomplete = fs::read(out.path().join("memory.bin.delta")).unwrap();
    assert_eq!(incomplete.len(), machine.memory.len());
    assert!(incomplete[2 * CHUNK..3 * CHUNK] == machine.memory[2 * CHUNK..3 * CHUNK]);
    assert!(
        fs::read(out.path().join("vmstate")).unwrap()
            == fs::read(machine.snapshot().join("vmstate")).unwrap()
    );
    let tested = Command::new("zstd").args(["-t", "-q"]).arg(machine.pack("delta")).status().unwrap();
    assert!(tested.success());
}
