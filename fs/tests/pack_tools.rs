//! Packs as everyone's tools see them: GNU tar and zstd, as installed. A machine without them fails these tests.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};

use forkd_fs::digest::Digest;
use forkd_fs::store::{Store, StoreOptions};
use forkd_fs::writer::{PackOptions, PackWriter, Pass, WriteError};

mod support;
use support::{CHUNK, Fixture, manifest, memory, noise};

fn run(program: &str, args: &[&str], dir: &Path) -> Output {
    let output = Command::new(program)
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && stderr.is_empty(), "{program} {args:?}: {stderr}");
    output
}

#[test]
fn tar_and_zstd_accept_a_pack_and_restore_its_holes() {
    let fixture = Fixture::new();
    let (dir, pack) = (fixture.dir.path(), fixture.pack.to_str().unwrap());
    run("zstd", &["-tq", pack], dir);
    let listing = run("tar", &["--zstd", "-tf", pack], dir);
    let names = ["manifest.toml", "snapshot.json", "vmstate", "trace", "memory.bin", "rootfs.erofs"];
    assert_eq!(String::from_utf8(listing.stdout).unwrap().lines().collect::<Vec<_>>(), names);

    let out = tempfile::tempdir().unwrap();
    run("tar", &["--zstd", "-xf", pack], out.path());
    for (name, plain) in &fixture.files {
        assert_eq!(Digest::of(&std::fs::read(out.path().join(name)).unwrap()), Digest::of(plain), "{name}");
        let piped = run("tar", &["--zstd", "-xOf", pack, name], out.path());
        assert_eq!(Digest::of(&piped.stdout), Digest::of(plain), "{name} through a pipe");
    }
    let restored = std::fs::metadata(out.path().join("memory.bin")).unwrap();
    assert!(
        restored.blocks() * 512 < restored.len() * 3 / 4,
        "{} of {} bytes",
        restored.blocks() * 512,
        restored.len()
    );
    assert_eq!(restored.mode() & 0o777, 0o644);
}

#[test]
fn tar_reads_files_of_every_shape() {
    let hole_at_end = [noise(1, CHUNK), vec![0; 3 * CHUNK + 5]].concat();
    let hole_at_start = [vec![0; 2 * CHUNK], noise(2, 100)].concat();
    let fixture = Fixture::with(&[
        ("a-empty", vec![]),
        ("b-one-byte", vec![7]),
        ("c-all-zero", vec![0; 5 * CHUNK + 1]),
        ("d-hole-at-end", hole_at_end),
        ("e-hole-at-start", hole_at_start),
        ("f-exact-chunk", noise(3, CHUNK)),
        ("g-block", noise(4, 512)),
        ("h-many-holes", memory(300)),
    ]);
    let (out, pack) = (tempfile::tempdir().unwrap(), fixture.pack.to_str().unwrap());
    run("zstd", &["-tq", pack], out.path());
    run("tar", &["--zstd", "-xf", pack], out.path());
    for (name, plain) in &fixture.files {
        assert_eq!(Digest::of(&std::fs::read(out.path().join(name)).unwrap()), Digest::of(plain), "{name}");
    }
}

/// What the seek table says must agree with the frames as zstd itself counts them.
#[test]
fn the_seek_table_covers_the_pack() {
    let fixture = Fixture::new();
    let bytes = fixture.bytes();
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let footer = bytes.len() - 9;
    assert_eq!(number(bytes.len() - 4), 0x8F92_EAB1);
    let frames = number(footer) as usize;
    let table = footer - frames * 8;
    assert_eq!((number(table - 8), number(table - 4) as usize), (0x184D_2A5E, frames * 8 + 9));
    let (mut at, mut plain) = (0, 0u64);
    for frame in 0..frames {
        let (compressed, decompressed) = (number(table + frame * 8) as usize, number(table + frame * 8 + 4));
        let whole = zstd::zstd_safe::find_frame_compressed_size(&bytes[at..]).unwrap();
        assert_eq!(whole, compressed, "frame {frame}");
        plain += u64::from(decompressed);
        at += compressed;
    }
    assert_eq!(at, table - 8, "the frames reach to the seek table");
    let unzstd = run("zstd", &["-dcq", fixture.pack.to_str().unwrap()], fixture.dir.path());
    assert_eq!(unzstd.stdout.len() as u64, plain);
    let pin = fixture.summary.index;
    assert_eq!((pin.offset + pin.length) as usize, table - 8, "the index comes right before it");
    assert_eq!(Digest::of(&bytes[pin.offset as usize..(pin.offset + pin.length) as usize]), pin.sha256);
}

#[tokio::test]
async fn the_summary_tells_the_truth() {
    let fixture = Fixture::new();
    let (bytes, summary) = (fixture.bytes(), &fixture.summary);
    assert_eq!((summary.pack_size, summary.pack_sha256), (bytes.len() as u64, Digest::of(&bytes)));
    // memory(40): 16 of 40 chunks are zeros, and so is the bit at the end.
    assert_eq!((summary.zero_chunks, summary.stored_chunks), (17, 24 + 6 + 3));
    let store = Store::open(fixture.local(), StoreOptions::default()).await.unwrap();
    assert_eq!(store.index_pin(), summary.index);
    assert_eq!(
        (store.index().pack_size(), store.index().stored_bytes()),
        (summary.pack_size, summary.stored_bytes)
    );
    assert_eq!(*store.manifest().await.unwrap(), summary.manifest);
    for file in &summary.manifest.files {
        assert_eq!(file.sha256, Digest::of(&fixture.files[&file.path]), "{}", file.path);
    }
}

#[test]
fn every_chunk_size_and_level_works_and_others_are_refused() {
    let fixture = Fixture::new();
    let from = fixture.dir.path().join("snapshot");
    let write = |chunk_size, level| {
        let out = fixture.dir.path().join("other.tar.zst");
        PackWriter::new(PackOptions { chunk_size, level, threads: 1 }).write(&from, manifest(), &out, &|_| ())
    };
    for (chunk_size, level) in [(64 << 10, 1), (256 << 10, 3), (4 << 20, 9)] {
        let summary = write(chunk_size, level).unwrap();
        assert_eq!(summary.manifest.files, fixture.summary.manifest.files);
        run("tar", &["--zstd", "-tf", "other.tar.zst"], fixture.dir.path());
    }
    for chunk_size in [0, 1, 4096, 100_000, 8 << 20, u32::MAX] {
        assert!(matches!(write(chunk_size, 3), Err(WriteError::ChunkSize { .. })), "{chunk_size}");
    }
}

#[test]
fn what_cannot_be_packed_is_named_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("snapshot");
    let out = dir.path().join("out.tar.zst");
    let pack = || PackWriter::default().write(&from, manifest(), &out, &|_| ()).unwrap_err();
    assert!(matches!(pack(), WriteError::Read { .. }), "no such directory");
    std::fs::create_dir(&from).unwrap();
    std::fs::create_dir(from.join("sub")).unwrap();
    assert!(matches!(pack(), WriteError::Refused { .. }), "a directory");
    std::fs::remove_dir(from.join("sub")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", from.join("link")).unwrap();
    assert!(matches!(pack(), WriteError::Refused { .. }), "a link");
    std::fs::remove_file(from.join("link")).unwrap();
    std::fs::write(from.join("a name"), b"x").unwrap();
    assert!(matches!(pack(), WriteError::Refused { .. }), "a name with a space");
    std::fs::remove_file(from.join("a name")).unwrap();
    let nowhere = dir.path().join("no/such/dir/out.tar.zst");
    let failed = PackWriter::default().write(&from, manifest(), &nowhere, &|_| ()).unwrap_err();
    assert!(matches!(failed, WriteError::Write { .. }));
    let left: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["snapshot"]);
}

#[test]
fn a_file_that_changes_meanwhile_is_noticed() {
    let fixture = Fixture::new();
    let from = fixture.dir.path().join("snapshot");
    let out = fixture.dir.path().join("other.tar.zst");
    let vmstate = from.join("vmstate");
    let touch = |progress: forkd_fs::writer::PackProgress| {
        if progress.pass == Pass::Compress && progress.done == progress.total {
            std::fs::write(&vmstate, b"other").unwrap();
        }
    };
    let failed = PackWriter::default().write(&from, manifest(), &out, &touch).unwrap_err();
    assert!(matches!(failed, WriteError::Changed { path } if path == vmstate));
    assert!(!out.exists());
}
