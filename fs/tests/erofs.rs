//! The root disk's files: what mkfs.erofs makes is shown as it was, through the tree and through the kernel, fetching no
//! more than needed.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use forkd_fs::digest::Digest;
use forkd_fs::fuse::MountedTree;
use forkd_fs::store::{PackLocation, PackSource};
use forkd_fs::tree::{Attributes, Entry, Inode, Kind, OpenedFile, PackListing, ROOT, Tree};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;

mod support;
use support::server::Server;
use support::{Fixture, mkfs, noise, options};

/// One of everything a root disk can hold.
fn varied(dir: &Path) {
    for (name, size) in [
        ("empty", 0),
        ("one", 1),
        ("tail", 100),
        ("block-1", 4095),
        ("block", 4096),
        ("block+1", 4097),
        ("blocks and a tail", 3 * 4096 + 700),
        ("chunk", 64 << 10),
        ("large", 5 << 20),
    ] {
        fs::write(dir.join(name), noise(size as u64 + 1, size)).unwrap();
    }
    // One less than the longest name: mkfs.erofs 1.5 does not take more.
    fs::write(dir.join("x".repeat(254)), b"long").unwrap();
    fs::write(dir.join("päivää-日本-🦀"), b"unicode").unwrap();
    fs::write(dir.join(OsString::from_vec(b"not \xff utf-8".to_vec())), b"bytes").unwrap();
    for before_dots in ["#sorts", "+before", "-dots"] {
        fs::write(dir.join(before_dots), before_dots).unwrap();
    }
    let deep = (0..40).fold(dir.to_owned(), |path, level| path.join(format!("level{level}")));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("bottom"), b"deep").unwrap();
    fs::create_dir(dir.join("no files")).unwrap();
    symlink("one", dir.join("relative")).unwrap();
    symlink("/etc/passwd", dir.join("absolute")).unwrap();
    symlink("../".repeat(1000) + "nowhere", dir.join("long link")).unwrap();
    fs::hard_link(dir.join("one"), dir.join("level0/same as one")).unwrap();
    let node = |name: &str, kind, major, minor| {
        mknodat(CWD, dir.join(name), kind, Mode::from_raw_mode(0o640), makedev(major, minor)).unwrap();
    };
    node("fifo", FileType::Fifo, 0, 0);
    node("socket", FileType::Socket, 0, 0);
    node("null", FileType::CharacterDevice, 1, 3);
    node("disk", FileType::BlockDevice, 259, 70_000);
    let many = dir.join("many");
    fs::create_dir(&many).unwrap();
    (0..10_000).for_each(|n| drop(File::create(many.join(format!("file-{n:05}"))).unwrap()));
    let sparse = File::create(dir.join("sparse")).unwrap();
    sparse.set_len(3 << 20).unwrap();
    sparse.write_all_at(b"in the middle", 1 << 20).unwrap();
    let set =
        |name: &str, mode| fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode)).unwrap();
    set("one", 0o4751);
    set("tail", 0o600);
    set("no files", 0o1777);
    std::os::unix::fs::lchown(dir.join("block"), Some(70_000), Some(123)).unwrap();
    std::os::unix::fs::lchown(dir.join("relative"), Some(1), Some(2)).unwrap();
    let old = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_007, 123_456_789);
    File::open(dir.join("block")).unwrap().set_modified(old).unwrap();
}

/// What there is to compare about a file. Sizes of directories are a file system's own affair.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Facts {
    kind: Kind,
    mode: u32,
    owner: (u32, u32),
    links: u32,
    device: (u32, u32),
    modified: SystemTime,
    size: u64,
    contents: Vec<u8>,
}

fn facts_of_dir(dir: &Path) -> BTreeMap<PathBuf, Facts> {
    let mut found = BTreeMap::new();
    let mut left = vec![dir.to_owned()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            let (kind, contents) = match FileType::from_raw_mode(meta.mode()) {
                FileType::Directory => (Kind::Directory, Vec::new()),
                FileType::Symlink => {
                    (Kind::Symlink, fs::read_link(&path).unwrap().into_os_string().into_vec())
                }
                FileType::Fifo => (Kind::Fifo, Vec::new()),
                FileType::Socket => (Kind::Socket, Vec::new()),
                FileType::CharacterDevice => (Kind::CharDevice, Vec::new()),
                FileType::BlockDevice => (Kind::BlockDevice, Vec::new()),
                _ => (Kind::File, Digest::of(&fs::read(&path).unwrap()).0.to_vec()),
            };
            if kind == Kind::Directory {
                left.push(path.clone());
            }
            let facts = Facts {
                kind,
                mode: meta.mode() & 0o7777,
                owner: (meta.uid(), meta.gid()),
                links: meta.nlink() as u32,
                device: (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev())),
                modified: meta.modified().unwrap(),
                size: if kind == Kind::Directory { 0 } else { meta.len() },
                contents,
            };
            found.insert(path.strip_prefix(dir).unwrap().to_owned(), facts);
        }
    }
    found
}

/// Every name in a directory, asked for piece by piece as the kernel does.
async fn all_entries(tree: &Tree, directory: Inode) -> Result<Vec<Entry>, Errno> {
    let mut all: Vec<Entry> = Vec::new();
    loop {
        let more = tree.entries_from(directory, all.last().map_or(0, |entry| entry.next)).await?;
        match more.is_empty() {
            true => return Ok(all),
            false => all.extend(more),
        }
    }
}

async fn facts_of_tree(tree: &Tree, root: Inode) -> BTreeMap<PathBuf, Facts> {
    let mut found = BTreeMap::new();
    let mut left = vec![(root, PathBuf::new())];
    while let Some((directory, path)) = left.pop() {
        for entry in all_entries(tree, directory).await.unwrap() {
            if entry.name == "." || entry.name == ".." {
                continue;
            }
            let path = path.join(&entry.name);
            let found_by_name = tree.lookup(directory, &entry.name).await.unwrap();
            assert_eq!((found_by_name.inode, found_by_name.kind), (entry.inode, entry.kind), "{path:?}");
            assert_eq!(tree.attributes(entry.inode).await.unwrap(), found_by_name);
            if entry.kind == Kind::Directory {
                left.push((entry.inode, path.clone()));
            }
            found.insert(path, facts_of(tree, &found_by_name).await);
        }
    }
    found
}

async fn facts_of(tree: &Tree, found: &Attributes) -> Facts {
    let contents = match found.kind {
        Kind::Symlink => tree.link_target(found.inode).await.unwrap().to_vec(),
        Kind::File => {
            assert!(matches!(tree.open(found.inode), Ok(OpenedFile::Immutable)));
            let mut plain = Vec::new();
            // A length that is no multiple of anything.
            while let piece = tree.read(found.inode, plain.len() as u64, 99_991).await.unwrap()
                && !piece.is_empty()
            {
                plain.extend_from_slice(&piece);
            }
            Digest::of(&plain).0.to_vec()
        }
        _ => Vec::new(),
    };
    let device = found.device;
    Facts {
        kind: found.kind,
        mode: u32::from(found.permissions),
        owner: found.owner.expect("the image says who owns it"),
        links: found.links,
        // new_decode_dev, include/linux/kdev_t.h.
        device: (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff00),
        modified: found.modified,
        size: if found.kind == Kind::Directory { 0 } else { found.size },
        contents,
    }
}

fn assert_same(got: &BTreeMap<PathBuf, Facts>, want: &BTreeMap<PathBuf, Facts>, how: &str) {
    for (path, want) in want {
        assert_eq!(got.get(path), Some(want), "{how}: {path:?}");
    }
    assert_eq!(got.len(), want.len(), "{how}");
}

fn pack(image: Vec<u8>) -> Fixture {
    Fixture::with(&[("vmstate", b"state".to_vec()), ("rootfs.erofs", image)])
}

fn tree_of(location: PackLocation) -> Tree {
    let listing = PackListing {
        owner: "o".into(),
        name: "n".into(),
        version: "v1".into(),
        location,
        sha256: None,
        modified: SystemTime::UNIX_EPOCH,
    };
    Tree::new(vec![listing], options())
}

async fn walk(tree: &Tree, path: &str) -> Result<Attributes, Errno> {
    let mut found = tree.attributes(ROOT).await?;
    for name in path.split('/') {
        found = tree.lookup(found.inode, OsStr::new(name)).await?;
    }
    Ok(found)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_layout_shows_the_tree_it_was_made_of() {
    let dir = tempfile::tempdir().unwrap();
    varied(dir.path());
    let want = facts_of_dir(dir.path());
    let layouts: [&[&str]; 6] = [
        &[],
        &["-Enoinline_data"],
        &["-Eforce-inode-extended"],
        &["--chunksize=4096"],
        &["--chunksize=65536", "-Eforce-chunk-indexes"],
        &["-x-1"],
    ];
    for args in layouts {
        let fixture = pack(mkfs(dir.path(), args));
        let tree = tree_of(fixture.local());
        let root = walk(&tree, "o/n/v1/rootfs").await.unwrap();
        assert_same(&facts_of_tree(&tree, root.inode).await, &want, &format!("{args:?}"));
    }
}

#[tokio::test]
async fn compact_inodes_have_the_time_of_the_image() {
    let dir = tempfile::tempdir().unwrap();
    varied(dir.path());
    // uid 70000 and the nanoseconds do not fit.
    std::os::unix::fs::lchown(dir.path().join("block"), Some(7), Some(8)).unwrap();
    let mut want = facts_of_dir(dir.path());
    let made = SystemTime::UNIX_EPOCH + Duration::from_secs(1_234_567_890);
    want.values_mut().for_each(|facts| facts.modified = made);
    let fixture = pack(mkfs(dir.path(), &["-Eforce-inode-compact", "-T1234567890"]));
    let tree = tree_of(fixture.local());
    let root = walk(&tree, "o/n/v1/rootfs").await.unwrap();
    assert_same(&facts_of_tree(&tree, root.inode).await, &want, "compact");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kernel_sees_the_same_through_fuse() {
    let (dir, at) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    varied(dir.path());
    let fixture = pack(mkfs(dir.path(), &["-Enoinline_data"]));
    let tree = Arc::new(tree_of(fixture.local()));
    let mounted = MountedTree::new(tree, at.path(), "test", tokio::runtime::Handle::current()).unwrap();
    let (version, source) = (at.path().join("o/n/v1"), dir.path().to_owned());
    tokio::task::spawn_blocking(move || {
        let root = version.join("rootfs");
        assert_same(&facts_of_dir(&root), &facts_of_dir(&source), "FUSE");
        let inode = |path: &Path| path.symlink_metadata().unwrap().ino();
        assert_eq!(inode(&root.join("one")), inode(&root.join("level0/same as one")));
        assert_eq!(inode(&root.join("..")), inode(&version));
        assert_eq!(inode(&root.join("level0/..")), inode(&root));
        let failed = |result: std::io::Result<File>| result.unwrap_err().raw_os_error().unwrap();
        assert_eq!(
            failed(File::open(root.join("null"))),
            Errno::ACCESS.raw_os_error(),
            "devices do not open"
        );
        assert_eq!(failed(File::open(root.join("none"))), Errno::NOENT.raw_os_error());
        assert_eq!(failed(File::create(root.join("one"))), Errno::ROFS.raw_os_error());
    })
    .await
    .unwrap();
    mounted.unmount().unwrap();
}

#[tokio::test]
async fn only_what_is_looked_at_is_fetched() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("large"), noise(1, 8 << 20)).unwrap();
    fs::write(dir.path().join("small"), b"small").unwrap();
    let fixture = pack(mkfs(dir.path(), &["-Enoinline_data"]));
    let server = Server::start(fixture.bytes()).await;
    let tree = tree_of(fixture.pinned(server.url()));
    let version = walk(&tree, "o/n/v1").await.unwrap();
    let names = all_entries(&tree, version.inode).await.unwrap();
    assert!(names.iter().any(|entry| entry.name == "rootfs" && entry.kind == Kind::Directory));
    walk(&tree, "o/n/v1/rootfs").await.unwrap();
    assert_eq!(server.request_count(), 1, "listing the pack and its rootfs takes the index alone");
    let small = walk(&tree, "o/n/v1/rootfs/small").await.unwrap();
    assert_eq!(tree.read(small.inode, 0, 100).await.unwrap(), &b"small"[..]);
    let fetched: usize =
        server.requests().iter().filter_map(|request| request.range.clone()).map(|range| range.len()).sum();
    assert!(fetched < 1 << 20, "{fetched} bytes of an 8 MiB image for 5");
}

#[tokio::test]
async fn a_hundred_thousand_names_are_listed_from_any_position() {
    let dir = tempfile::tempdir().unwrap();
    (0..100_000).for_each(|n| drop(File::create(dir.path().join(format!("{n:06}"))).unwrap()));
    let fixture = pack(mkfs(dir.path(), &[]));
    let tree = tree_of(fixture.local());
    let root = walk(&tree, "o/n/v1/rootfs").await.unwrap().inode;
    let started = Instant::now();
    let all = all_entries(&tree, root).await.unwrap();
    let took = started.elapsed();
    println!("100,000 names in {took:?}");
    assert_eq!(all.len(), 100_002);
    // Quadratic work took minutes.
    assert!(took < Duration::from_secs(5), "{took:?}");
    for at in (0..all.len()).step_by(7919) {
        let rest = tree.entries_from(root, all[at].next).await.unwrap();
        assert_eq!(rest.first().map(|entry| &entry.name), all.get(at + 1).map(|entry| &entry.name));
    }
    for position in [all[all.len() - 1].next, 1 << 40, i64::MAX as u64, u64::MAX] {
        assert_eq!(tree.entries_from(root, position).await.unwrap(), [], "{position}");
    }
    let started = Instant::now();
    for n in (0..100_000).step_by(100) {
        assert_eq!(tree.lookup(root, OsStr::new(&format!("{n:06}"))).await.unwrap().kind, Kind::File);
    }
    println!("1,000 lookups among them in {:?}", started.elapsed());
    assert_eq!(tree.lookup(root, OsStr::new("100000")).await, Err(Errno::NOENT));
}

#[tokio::test]
async fn what_cannot_be_read_says_why() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("text"), "abcdefgh".repeat(100_000)).unwrap();
    fs::write(dir.path().join("noise"), noise(3, 10_000)).unwrap();
    let fixture = pack(mkfs(dir.path(), &["-zlz4"]));
    let tree = tree_of(fixture.local());
    let text = walk(&tree, "o/n/v1/rootfs/text").await.unwrap();
    assert_eq!(tree.read(text.inode, 0, 10).await, Err(Errno::OPNOTSUPP));
    let report = walk(&tree, "o/n/v1/.forkd/stats.json").await.unwrap();
    let Ok(OpenedFile::Report(report)) = tree.open(report.inode) else { panic!("no report") };
    assert!(String::from_utf8_lossy(&report).contains("uses compression, which forkd does not read"));

    let image = mkfs(dir.path(), &[]);
    let with = |at: usize, byte: u8| {
        let mut image = image.clone();
        image[at] = byte;
        image
    };
    for (what, image, errno) in [
        ("empty", Vec::new(), Errno::IO),
        ("noise", noise(4, 300_000), Errno::IO),
        ("zeros", vec![0; 300_000], Errno::IO),
        ("cut in the superblock", image[..1100].to_vec(), Errno::IO),
        ("cut in the middle", image[..4096].to_vec(), Errno::IO),
        ("blocks of 2^200", with(1024 + 12, 200), Errno::OPNOTSUPP),
        ("48-bit addresses", with(1024 + 80, 0x80), Errno::OPNOTSUPP),
        ("other devices", with(1024 + 86, 1), Errno::OPNOTSUPP),
    ] {
        let fixture = pack(image);
        let tree = tree_of(fixture.local());
        let root = walk(&tree, "o/n/v1/rootfs").await.unwrap();
        let listed = all_entries(&tree, root.inode).await;
        let read = match tree.lookup(root.inode, OsStr::new("noise")).await {
            Ok(found) => tree.read(found.inode, 0, 10_000).await.map(drop),
            Err(error) => Err(error),
        };
        assert_eq!(listed.map(drop).and(read), Err(errno), "{what}");
        walk(&tree, "o/n/v1/vmstate").await.unwrap();
    }
    let without = Fixture::with(&[("vmstate", b"state".to_vec())]);
    assert_eq!(walk(&tree_of(without.local()), "o/n/v1/rootfs").await, Err(Errno::NOENT));
}

#[tokio::test]
async fn a_hub_that_fails_gives_eio_and_then_the_bytes() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), noise(1, 1 << 20)).unwrap();
    let fixture = pack(mkfs(dir.path(), &["-Enoinline_data"]));
    let mut server = Server::start(fixture.bytes()).await;
    let tree = tree_of(fixture.pinned(server.url()));
    let file = walk(&tree, "o/n/v1/rootfs/file").await.unwrap();
    server.stop().await;
    assert_eq!(tree.read(file.inode, 900_000, 10).await, Err(Errno::IO));
    server.resume().await;
    assert_eq!(tree.read(file.inode, 900_000, 10).await.unwrap(), noise(1, 1 << 20)[900_000..900_010]);
}

#[tokio::test]
async fn two_at_once_open_the_image_once() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), b"x").unwrap();
    let fixture = pack(mkfs(dir.path(), &[]));
    let location = PackLocation { source: PackSource::Path(fixture.pack.clone()), size: None, index: None };
    let tree = Arc::new(tree_of(location));
    // Two at once: the image is opened by one of them.
    let both = tokio::join!(walk(&tree, "o/n/v1/rootfs/f"), walk(&tree, "o/n/v1/rootfs/f"));
    assert_eq!(both.0.unwrap().inode, both.1.unwrap().inode);
}
