//! The mount's tree without FUSE: names, sizes, links, holes and errnos, over packs in local files.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use forkd_fs::manifest::{KvmKind, Manifest, Requires};
use forkd_fs::store::{PackLocation, PackSource, StoreOptions};
use forkd_fs::tree::{Attributes, Kind, MAX_READ, OpenedFile, PackListing, ROOT, Tree};
use forkd_fs::writer::{PackOptions, PackWriter};
use rustix::io::Errno;

mod support;
use support::server::{Fault, Server};

const CHUNK: u64 = 64 << 10;

fn pack(dir: &Path) -> PathBuf {
    let files = dir.join("files");
    std::fs::create_dir(&files).unwrap();
    std::fs::write(files.join("vmstate"), b"state").unwrap();
    std::fs::write(files.join("trace"), b"").unwrap();
    // Chunks: zero, data, data, zero, and a last short one of data.
    let mut memory = vec![0; CHUNK as usize * 4 + 10];
    memory[CHUNK as usize + 5] = 1;
    memory[CHUNK as usize * 3 - 1] = 2;
    memory[CHUNK as usize * 4 + 9] = 3;
    std::fs::write(files.join("memory.bin"), &memory).unwrap();
    let requires = Requires {
        memory_mib: 1,
        vcpus: 1,
        kvm_kind: KvmKind::Pvm,
        kernel: "k".into(),
        vmstate_version: 1,
        cpu_features: Vec::new(),
        cpu_vendor: String::new(),
    };
    let manifest = Manifest {
        forkd_pack_version: 3,
        tag: "t".into(),
        description: String::new(),
        base_image: String::new(),
        created_at: "2026-01-02T03:04:05Z".into(),
        forkd_version: "0".into(),
        requires,
        files: Vec::new(),
        probe: None,
    };
    let out = dir.join("t.tar.zst");
    let options = PackOptions { chunk_size: CHUNK as u32, ..PackOptions::default() };
    PackWriter::new(options).write(&files, manifest, &out, &|_| ()).unwrap();
    out
}

fn listing(name: &str, version: &str, path: &Path) -> PackListing {
    PackListing {
        owner: "o".into(),
        name: name.into(),
        version: version.into(),
        location: PackLocation { source: PackSource::Path(path.to_owned()), size: None, index: None },
        sha256: None,
        modified: SystemTime::UNIX_EPOCH,
    }
}

async fn walk(tree: &Tree, path: &str) -> Result<Attributes, Errno> {
    let mut found = tree.attributes(ROOT).await?;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        found = tree.lookup(found.inode, name.as_ref()).await?;
    }
    Ok(found)
}

#[tokio::test]
async fn listings_become_directories_and_latest_a_link_to_its_twin() {
    let dir = tempfile::tempdir().unwrap();
    let (path, other) = (pack(dir.path()), dir.path().join("other"));
    let tree = Tree::new(
        vec![
            listing("n", "latest", &path),
            listing("n", "v1", &path),
            listing("alone", "latest", &path),
            listing("moved", "latest", &other),
            listing("moved", "v1", &path),
            listing("n", "v1", &other),
            listing("..", "v1", &path),
            listing("n", "a/b", &path),
        ],
        StoreOptions::default(),
    );
    let link = walk(&tree, "o/n/latest").await.unwrap();
    assert_eq!((link.kind, tree.link_target(link.inode).await), (Kind::Symlink, Ok("v1".into())));
    assert_eq!(walk(&tree, "o/alone/latest").await.unwrap().kind, Kind::Directory);
    assert_eq!(walk(&tree, "o/moved/latest").await.unwrap().kind, Kind::Directory);
    let names = async |path: &str| {
        let inode = walk(&tree, path).await.unwrap().inode;
        let entries = tree.entries_from(inode, 0).await.unwrap();
        entries.into_iter().map(|entry| entry.name).collect::<Vec<_>>()
    };
    assert_eq!(names("").await, [".", "..", ".forkd", "o"]);
    assert_eq!(names("o").await, [".", "..", "alone", "moved", "n"]);
    assert_eq!(names("o/n").await, [".", "..", "latest", "v1"]);
    assert_eq!(
        names("o/n/v1").await,
        [".", "..", ".forkd", "manifest.toml", "vmstate", "trace", "memory.bin"]
    );
    assert_eq!(names("o/n/v1/.forkd").await, [".", "..", "stats.json", "blocks"]);
    assert_eq!(walk(&tree, "o/n").await.unwrap().links, 3, "two and one subdirectory; links do not count");
}

#[tokio::test]
async fn members_have_their_bytes_and_holes() {
    let dir = tempfile::tempdir().unwrap();
    let path = pack(dir.path());
    let original = std::fs::read(dir.path().join("files/memory.bin")).unwrap();
    let tree = Tree::new(vec![listing("n", "v1", &path)], StoreOptions::default());
    let memory = walk(&tree, "o/n/v1/memory.bin").await.unwrap();
    assert_eq!((memory.size, memory.allocated), (CHUNK * 4 + 10, CHUNK * 3));
    assert!(matches!(tree.open(memory.inode), Ok(OpenedFile::Immutable)));
    for (offset, len) in
        [(0, 10), (CHUNK - 1, 2), (CHUNK * 3 - 1, 70_000), (CHUNK * 4, MAX_READ), (CHUNK * 5, 1)]
    {
        let start = (offset as usize).min(original.len());
        let end = (start + len as usize).min(original.len());
        assert!(
            tree.read(memory.inode, offset, len).await.unwrap() == original[start..end],
            "{offset}+{len}"
        );
    }
    assert_eq!(tree.read(memory.inode, u64::MAX, u32::MAX).await.unwrap().len(), 0);
    for (offset, data, found) in [
        (0, true, Ok(CHUNK)),
        (CHUNK + 7, true, Ok(CHUNK + 7)),
        (0, false, Ok(0)),
        (CHUNK, false, Ok(CHUNK * 3)),
        (CHUNK * 3 + 1, true, Ok(CHUNK * 4)),
        (CHUNK * 4, false, Ok(CHUNK * 4 + 10)),
        (CHUNK * 4 + 10, true, Err(Errno::NXIO)),
        (u64::MAX, false, Err(Errno::NXIO)),
    ] {
        assert_eq!(tree.seek(memory.inode, offset, data).await, found, "{offset} {data}");
    }
    let trace = walk(&tree, "o/n/v1/trace").await.unwrap();
    assert_eq!(tree.seek(trace.inode, 0, true).await, Err(Errno::NXIO));
}

#[tokio::test]
async fn reports_open_no_pack_and_name_what_failed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, missing) = (pack(dir.path()), dir.path().join("missing"));
    let tree =
        Tree::new(vec![listing("n", "v1", &path), listing("n", "v2", &missing)], StoreOptions::default());
    let report = async |path: &str| {
        let inode = walk(&tree, path).await.unwrap().inode;
        match tree.open(inode) {
            Ok(OpenedFile::Report(bytes)) => serde_json::from_slice::<serde_json::Value>(&bytes).unwrap(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(report("o/n/v1/.forkd/stats.json").await["opened"], false);
    assert_eq!(report(".forkd/stats.json").await["packs"].as_array().unwrap().len(), 0);
    walk(&tree, "o/n/v1/vmstate").await.unwrap();
    assert_eq!(walk(&tree, "o/n/v2/vmstate").await, Err(Errno::IO));
    let packs = report(".forkd/stats.json").await["packs"].clone();
    assert_eq!((&packs[0]["opened"], &packs[1]["opened"]), (&true.into(), &false.into()));
    assert!(packs[1]["last_error"].as_str().unwrap().contains("missing"), "{packs}");
}

#[tokio::test]
async fn inodes_nobody_gave_out_are_stale() {
    let dir = tempfile::tempdir().unwrap();
    let tree = Tree::new(vec![listing("n", "v1", &pack(dir.path()))], StoreOptions::default());
    for inode in [0, 999, 2 << 32, (1 << 32) + 7, (1 << 32) + 4000, u64::MAX] {
        assert_eq!(tree.attributes(inode).await.err(), Some(Errno::STALE), "{inode:#x}");
        assert!(tree.entries_from(inode, 0).await.is_err(), "{inode:#x}");
        assert!(tree.read(inode, 0, 1).await.is_err(), "{inode:#x}");
    }
    assert_eq!(tree.open(ROOT).err(), Some(Errno::ISDIR));
    assert_eq!(tree.lookup(ROOT, "none".as_ref()).await.err(), Some(Errno::NOENT));
}

#[tokio::test]
async fn a_new_registry_shows_and_hides_names_and_open_files_stay() {
    let dir = tempfile::tempdir().unwrap();
    let path = pack(dir.path());
    let moved = dir.path().join("moved.tar.zst");
    std::fs::copy(&path, &moved).unwrap();
    let before = [listing("n", "v1", &path), listing("n", "latest", &path), listing("gone", "v1", &path)];
    let tree = Tree::new(before.to_vec(), StoreOptions::default());
    let package = walk(&tree, "o/n").await.unwrap().inode;
    let kept = walk(&tree, "o/n/v1/memory.bin").await.unwrap().inode;
    let open = walk(&tree, "o/gone/v1/memory.bin").await.unwrap().inode;
    let bytes = tree.read(open, 0, MAX_READ).await.unwrap();

    assert_eq!(tree.refresh(&before), [], "the same registry changes nothing");
    let after = [
        listing("n", "v1", &path),
        listing("n", "v2", &moved),
        listing("n", "latest", &moved),
        listing("new", "v1", &path),
    ];
    let changed: Vec<String> = tree.refresh(&after).into_iter().map(|changed| changed.name).collect();
    assert_eq!(changed, ["latest", "v2", "new", "v1", "v1", "gone"]);
    assert_eq!(walk(&tree, "o/n").await.unwrap().inode, package);
    assert_eq!(walk(&tree, "o/n/v1/memory.bin").await.unwrap().inode, kept);
    let link = walk(&tree, "o/n/latest").await.unwrap();
    assert_eq!(tree.link_target(link.inode).await, Ok("v2".into()));
    assert_eq!(walk(&tree, "o/gone").await.err(), Some(Errno::NOENT));
    assert_eq!(tree.read(open, 0, MAX_READ).await.unwrap(), bytes, "who has it open keeps reading");
    let size = std::fs::metadata(&path).unwrap().len();
    assert_eq!(tree.total_bytes(), size, "of what is listed, only n/v1 was opened; gone no longer counts");
}

#[tokio::test]
async fn readers_of_a_pack_that_does_not_open_share_one_failure() {
    let server = Server::start(vec![1; 1000]).await;
    server.fail_always(Fault::Stall);
    let location = PackLocation { source: PackSource::Url(server.url()), size: None, index: None };
    let deadline = std::time::Duration::from_millis(400);
    let tree = std::sync::Arc::new(Tree::new(
        vec![PackListing { location, ..listing("n", "v1", Path::new("unused")) }],
        StoreOptions { demand_deadline: deadline, ..support::options() },
    ));
    let version = walk(&tree, "o/n/v1").await.unwrap().inode;
    let started = std::time::Instant::now();
    let look = |_| {
        let tree = tree.clone();
        tokio::spawn(async move { tree.lookup(version, "vmstate".as_ref()).await.err() })
    };
    for looked in (0..12).map(look).collect::<Vec<_>>() {
        assert_eq!(looked.await.unwrap(), Some(Errno::IO));
    }
    let took = started.elapsed();
    assert!(took < deadline * 3, "twelve readers waited {took:?} for one host");
    server.fail_always(Fault::Fine);
    let later = tree.lookup(version, "vmstate".as_ref()).await.err();
    assert_eq!(later, Some(Errno::IO), "it answers now, with what is no pack");
    assert!(server.request_count() > 3, "whoever comes later asks again");
}
