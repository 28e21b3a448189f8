//! The predecessor's packs: listed and unpacked, never trusted, and told apart when opened.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use forkd_fs::digest::Digest;
use forkd_fs::legacy::{self, LegacyError};
use forkd_fs::store::{OpenError, PackLocation, PackSource, Store, StoreOptions};
use forkd_fs::tree::{Attributes, Kind, OpenedFile, PackListing, ROOT, Tree};
use rustix::io::Errno;

mod support;
use support::server::{Fault, Server};
use support::{CHUNK, Fixture, memory, options};

const LIMIT: u64 = 64 << 20;

/// Writes a pack as the predecessor does: one zstd frame around a tar of these entries.
fn write_pack(dir: &Path, entries: &[(&str, &[u8])]) -> PathBuf {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, contents) in entries {
        let mut header = tar::Header::new_gnu();
        // Straight into the field: the library refuses the paths some tests want.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        tar.append(&header, *contents).unwrap();
    }
    compress(dir, &tar.into_inner().unwrap())
}

fn compress(dir: &Path, tar: &[u8]) -> PathBuf {
    let path = dir.join("old.tar.zst");
    std::fs::write(&path, zstd::encode_all(tar, 3).unwrap()).unwrap();
    path
}

fn file_entry(path: &str, contents: &[u8]) -> String {
    format!("path = \"{path}\"\nsize = {}\nsha256 = \"{}\"\n", contents.len(), Digest::of(contents))
}

/// A pack of layout 1 with its plain contents.
fn version_1(dir: &Path) -> (PathBuf, BTreeMap<&'static str, Vec<u8>>) {
    let files = BTreeMap::from([
        ("snapshot.json", b"{}".to_vec()),
        ("vmstate", b"state".to_vec()),
        ("rootfs.ext4", support::text(1, 100_000)),
        ("memory.bin", memory(20)),
    ]);
    let mut manifest = "forkd_pack_version = 1\ntag = \"old\"\ndescription = \"d\"\n".to_owned();
    manifest += "[rootfs]\ntarget_path = \"/etc/cron.d/evil\"\nsha256 = \"\"\nsize = 3\n";
    for (name, contents) in &files {
        manifest += &format!("[[files]]\n{}", file_entry(name, contents));
    }
    let order = ["snapshot.json", "vmstate", "rootfs.ext4", "memory.bin"];
    let mut entries: Vec<(&str, &[u8])> = vec![("manifest.toml", manifest.as_bytes())];
    entries.extend(order.iter().map(|name| (*name, &files[*name][..])));
    (write_pack(dir, &entries), files)
}

/// A pack of layout 2: a chain of two links.
fn version_2(dir: &Path) -> PathBuf {
    let mut manifest = "forkd_pack_version = 2\ntag = \"child\"\nparent_tag = \"base\"\n".to_owned();
    for tag in ["base", "child"] {
        let file = file_entry("memory.bin", tag.as_bytes());
        manifest += &format!("[[chain]]\ntag = \"{tag}\"\n[[chain.files]]\n{file}");
    }
    let entries: [(&str, &[u8]); 5] = [
        ("manifest.toml", manifest.as_bytes()),
        ("base/snapshot.json", b"{}"),
        ("base/memory.bin", b"base"),
        ("child/snapshot.json", b"{}"),
        ("child/memory.bin", b"child"),
    ];
    write_pack(dir, &entries)
}

#[test]
fn layout_1_is_listed_and_unpacked_with_holes() {
    let dir = tempfile::tempdir().unwrap();
    let (pack, files) = version_1(dir.path());
    let listed = legacy::list(&pack, LIMIT).unwrap();
    assert_eq!((listed.manifest.forkd_pack_version, listed.manifest.tag.as_str()), (1, "old"));
    let names: Vec<_> = listed.members.iter().map(|member| member.name).collect();
    assert_eq!(names, ["manifest.toml", "snapshot.json", "vmstate", "rootfs.ext4", "memory.bin"]);

    let out = tempfile::tempdir().unwrap();
    legacy::unpack(&pack, out.path(), LIMIT).unwrap();
    for (name, contents) in &files {
        assert!(std::fs::read(out.path().join(name)).unwrap() == *contents, "{name}");
    }
    let image = std::fs::metadata(out.path().join("memory.bin")).unwrap();
    assert!(image.blocks() * 512 < 15 * CHUNK as u64, "zeros are holes");
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 5);
}

#[test]
fn layout_2_unpacks_into_a_directory_a_tag() {
    let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let unpacked = legacy::unpack(&version_2(dir.path()), out.path(), LIMIT).unwrap();
    assert_eq!(unpacked.members[4].path(), "child/memory.bin");
    for tag in ["base", "child"] {
        assert_eq!(std::fs::read_to_string(out.path().join(tag).join("memory.bin")).unwrap(), tag);
    }
}

#[test]
fn paths_from_the_pack_are_never_used() {
    let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let inner = out.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    let manifest = b"forkd_pack_version = 1";
    let entries: [(&str, &[u8]); 8] = [
        ("manifest.toml", manifest),
        ("../memory.bin", b"evil"),
        ("/etc/forkd-evil/memory.bin", b"evil"),
        ("a/../../vmstate", b"evil"),
        ("../vmstate", b"evil"),
        (".hidden/vmstate", b"evil"),
        ("tag/authorized_keys", b"evil"),
        ("./snapshot.json", b"{}"),
    ];
    let unpacked = legacy::unpack(&write_pack(dir.path(), &entries), &inner, LIMIT).unwrap();
    let names: Vec<_> = unpacked.members.iter().map(|member| member.path()).collect();
    assert_eq!(names, ["manifest.toml", "snapshot.json"]);
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 1, "nothing beside the directory");
    assert_eq!(std::fs::read_dir(&inner).unwrap().count(), 2);
}

#[test]
fn hostile_and_damaged_packs_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let unpack = |pack: &Path, limit| {
        let out = tempfile::tempdir().unwrap();
        legacy::unpack(pack, out.path(), limit).expect_err("refused")
    };
    let (pack, _) = version_1(dir.path());
    assert!(matches!(unpack(&pack, 1 << 20), LegacyError::TooLarge { limit, .. } if limit == 1 << 20));

    let whole = std::fs::read(&pack).unwrap();
    std::fs::write(&pack, &whole[..whole.len() / 2]).unwrap();
    assert!(matches!(unpack(&pack, LIMIT), LegacyError::Read { .. }), "cut short");
    std::fs::write(&pack, b"not zstd at all").unwrap();
    assert!(matches!(unpack(&pack, LIMIT), LegacyError::Read { .. }));
    assert!(matches!(unpack(&dir.path().join("none"), LIMIT), LegacyError::Open { .. }));

    let refused = |entries: &[(&str, &[u8])]| unpack(&write_pack(dir.path(), entries), LIMIT);
    let manifest: (&str, &[u8]) = ("manifest.toml", b"forkd_pack_version = 1");
    assert!(matches!(refused(&[]), LegacyError::NotLegacy { .. }));
    assert!(matches!(refused(&[("vmstate", b"x"), manifest]), LegacyError::NotLegacy { .. }));
    assert!(matches!(
        refused(&[("manifest.toml", b"forkd_pack_version = 9")]),
        LegacyError::NotLegacy { .. }
    ));
    assert!(matches!(refused(&[("manifest.toml", b"what")]), LegacyError::Manifest { .. }));
    assert!(matches!(refused(&[("manifest.toml", &[0xff; 9])]), LegacyError::Manifest { .. }));
    let huge = vec![b'#'; (1 << 20) + 1];
    assert!(matches!(refused(&[("manifest.toml", &huge)]), LegacyError::Manifest { .. }));
    assert!(matches!(
        refused(&[manifest, ("vmstate", b"1"), ("vmstate", b"2")]),
        LegacyError::Duplicate { .. }
    ));
    let listed = format!("forkd_pack_version = 1\n[[files]]\n{}", file_entry("vmstate", b"other"));
    let wrong = refused(&[("manifest.toml", listed.as_bytes()), ("vmstate", b"this")]);
    assert!(matches!(wrong, LegacyError::Digest { name, .. } if name == "vmstate"));
    let many = vec![("x", &b""[..]); 5000];
    assert!(matches!(refused(&[&[manifest], &many[..]].concat()), LegacyError::TooLarge { .. }));
}

/// A size in a header that nothing backs, and a link that would be followed, cost nothing.
#[test]
fn sizes_and_types_that_lie_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let with_entry = |kind, size| {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        let text = b"forkd_pack_version = 1";
        header.set_path("manifest.toml").unwrap();
        header.set_size(text.len() as u64);
        header.set_cksum();
        tar.append(&header, &text[..]).unwrap();
        let mut tar = tar.into_inner().unwrap();
        tar.truncate(1024);
        let mut header = tar::Header::new_gnu();
        header.set_path("memory.bin").unwrap();
        header.set_entry_type(kind);
        header.set_link_name("/etc/passwd").unwrap();
        header.set_size(size);
        header.set_cksum();
        tar.write_all(header.as_bytes()).unwrap();
        tar.extend_from_slice(&[0; 1024]);
        compress(dir.path(), &tar)
    };
    let unpack = |pack: &Path| {
        let out = tempfile::tempdir().unwrap();
        legacy::unpack(pack, out.path(), LIMIT).map(|pack| pack.members.len())
    };
    assert!(matches!(
        unpack(&with_entry(tar::EntryType::Regular, 1 << 62)),
        Err(LegacyError::TooLarge { .. })
    ));
    assert!(matches!(unpack(&with_entry(tar::EntryType::Regular, 1 << 20)), Err(LegacyError::Read { .. })));
    for kind in
        [tar::EntryType::Symlink, tar::EntryType::Link, tar::EntryType::Char, tar::EntryType::GNULongName]
    {
        assert_eq!(unpack(&with_entry(kind, 0)).unwrap(), 1, "{kind:?}: only the manifest is a member");
    }
}

#[tokio::test]
async fn a_store_says_which_layout_it_met() {
    let dir = tempfile::tempdir().unwrap();
    for version in [1, 2] {
        // Both have the same name.
        let pack = if version == 1 { version_1(dir.path()).0 } else { version_2(dir.path()) };
        let local = PackLocation { source: PackSource::Path(pack.clone()), size: None, index: None };
        let failed = Store::open(local.clone(), options()).await.unwrap_err();
        assert!(matches!(failed, OpenError::Legacy { version: found, .. } if found == version), "{failed}");
        let server = Server::start(std::fs::read(&pack).unwrap()).await;
        let remote = PackLocation { source: PackSource::Url(server.url()), ..local };
        let failed = Store::open(remote, options()).await.unwrap_err();
        assert!(matches!(failed, OpenError::Legacy { version: found, .. } if found == version), "{failed}");
    }
}

#[test]
fn a_pack_of_layout_3_is_not_mistaken_for_one() {
    let fixture = Fixture::new();
    assert!(matches!(legacy::list(&fixture.pack, LIMIT), Err(LegacyError::NotLegacy { .. })));
}

fn mounted(source: PackSource, sha256: Option<Digest>, options: StoreOptions) -> Tree {
    let listing = PackListing {
        owner: "o".into(),
        name: "n".into(),
        version: "v1".into(),
        location: PackLocation { source, size: None, index: None },
        sha256,
        modified: SystemTime::UNIX_EPOCH,
    };
    Tree::new(vec![listing], options)
}

async fn walk(tree: &Tree, path: &str) -> Result<Attributes, Errno> {
    let mut found = tree.attributes(ROOT).await?;
    for name in path.split('/') {
        found = tree.lookup(found.inode, OsStr::new(name)).await?;
    }
    Ok(found)
}

async fn names(tree: &Tree, path: &str) -> Vec<String> {
    let inode = walk(tree, path).await.unwrap().inode;
    let entries = tree.entries_from(inode, 0).await.unwrap();
    assert_eq!(tree.entries_from(inode, entries.last().unwrap().next).await.unwrap(), []);
    entries.into_iter().map(|entry| entry.name.into_string().unwrap()).collect()
}

async fn contents(tree: &Tree, path: &str) -> Vec<u8> {
    let found = walk(tree, path).await.unwrap();
    assert_eq!(found.kind, Kind::File);
    let mut plain = Vec::new();
    while let piece = tree.read(found.inode, plain.len() as u64, 77_777).await.unwrap()
        && !piece.is_empty()
    {
        plain.extend_from_slice(&piece);
    }
    assert_eq!(plain.len() as u64, found.size);
    plain
}

async fn stats(tree: &Tree) -> serde_json::Value {
    let report = walk(tree, "o/n/v1/.forkd/stats.json").await.unwrap();
    let Ok(OpenedFile::Report(bytes)) = tree.open(report.inode) else { panic!("no report") };
    serde_json::from_slice(&bytes).unwrap()
}

#[tokio::test]
async fn a_mount_shows_layout_1_downloaded_whole_and_once() {
    let dir = tempfile::tempdir().unwrap();
    let (pack, files) = version_1(dir.path());
    let bytes = std::fs::read(&pack).unwrap();
    let (digest, server) = (Digest::of(&bytes), Server::start(bytes).await);
    let tree = mounted(PackSource::Url(server.url()), Some(digest), options());
    // Two at once.
    let (one, two) = tokio::join!(walk(&tree, "o/n/v1/memory.bin"), walk(&tree, "o/n/v1/vmstate"));
    assert_eq!((one.unwrap().kind, two.unwrap().size), (Kind::File, 5));
    let expected =
        [".", "..", ".forkd", "manifest.toml", "snapshot.json", "vmstate", "rootfs.ext4", "memory.bin"];
    assert_eq!(names(&tree, "o/n/v1").await, expected);
    for (name, plain) in &files {
        assert!(contents(&tree, &format!("o/n/v1/{name}")).await == *plain, "{name}");
    }
    let memory = walk(&tree, "o/n/v1/memory.bin").await.unwrap();
    assert!(memory.allocated < memory.size, "zeros are holes");
    assert_eq!(tree.seek(memory.inode, 0, true).await, Ok(2 * CHUNK as u64));
    assert_eq!(tree.seek(memory.inode, memory.size, true).await, Err(Errno::NXIO));
    assert_eq!(tree.read(memory.inode, u64::MAX, 10).await.unwrap().len(), 0);
    let requested = server
        .requests()
        .iter()
        .filter_map(|request| request.range.clone())
        .map(|range| range.len())
        .sum::<usize>();
    let size = server.state.object.lock().unwrap().len();
    // Its end and its beginning, to see what it is, and then all of it.
    assert!(requested <= size + (256 << 10) + (128 << 10) + 100, "{requested} of {size}");
    assert_eq!(stats(&tree).await["opened"], true);
    for name in ["rootfs", "trace", "old"] {
        assert_eq!(walk(&tree, &format!("o/n/v1/{name}")).await, Err(Errno::NOENT), "{name}");
    }
}

#[tokio::test]
async fn a_mount_shows_the_links_of_layout_2_as_directories() {
    let dir = tempfile::tempdir().unwrap();
    let tree = mounted(PackSource::Path(version_2(dir.path())), None, options());
    assert_eq!(names(&tree, "o/n/v1").await, [".", "..", ".forkd", "manifest.toml", "base", "child"]);
    for tag in ["base", "child"] {
        assert_eq!(names(&tree, &format!("o/n/v1/{tag}")).await, [".", "..", "snapshot.json", "memory.bin"]);
        assert_eq!(contents(&tree, &format!("o/n/v1/{tag}/memory.bin")).await, tag.as_bytes());
        assert_eq!(walk(&tree, &format!("o/n/v1/{tag}/vmstate")).await, Err(Errno::NOENT));
    }
    let pack = walk(&tree, "o/n/v1").await.unwrap().inode;
    for slot in [15, 40, 1 << 29, (1 << 30) + 2, 1 << 31] {
        assert_eq!(tree.attributes(pack | slot).await.err(), Some(Errno::STALE), "{slot:#x}");
        assert!(tree.read(pack | slot, 0, 1).await.is_err(), "{slot:#x}");
        assert!(tree.entries_from(pack | slot, 0).await.is_err(), "{slot:#x}");
    }
}

#[tokio::test]
async fn a_mount_refuses_damaged_and_hostile_packs_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let (pack, _) = version_1(dir.path());
    let whole = std::fs::read(&pack).unwrap();
    let manifest: (&str, &[u8]) = ("manifest.toml", b"forkd_pack_version = 1");
    let listed = format!("forkd_pack_version = 1\n[[files]]\n{}", file_entry("vmstate", b"other"));
    let made = |entries: &[(&str, &[u8])]| std::fs::read(write_pack(dir.path(), entries)).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    let digest = Some(Digest::of(&whole));
    for (what, bytes, sha256, errno, says) in [
        ("flipped, digest known", flipped, digest, Errno::IO, "the registry says"),
        ("cut short", whole[..whole.len() / 2].to_vec(), None, Errno::IO, "cannot read the pack"),
        (
            "cut short, digest known",
            whole[..whole.len() / 2].to_vec(),
            digest,
            Errno::IO,
            "the registry says",
        ),
        (
            "another member",
            made(&[("manifest.toml", listed.as_bytes()), ("vmstate", b"this")]),
            None,
            Errno::IO,
            "vmstate",
        ),
        ("twice", made(&[manifest, ("vmstate", b"1"), ("vmstate", b"2")]), None, Errno::IO, "twice"),
        (
            "too many entries",
            made(&[&[manifest], &vec![("x", &b""[..]); 5000][..]].concat()),
            None,
            Errno::FBIG,
            "more than",
        ),
        ("empty", Vec::new(), None, Errno::IO, "not a forkd pack"),
    ] {
        let path = dir.path().join("mounted.tar.zst");
        std::fs::write(&path, bytes).unwrap();
        let tree = mounted(PackSource::Path(path), sha256, options());
        assert_eq!(walk(&tree, "o/n/v1/vmstate").await, Err(errno), "{what}");
        let stats = stats(&tree).await;
        assert!(stats["last_error"].as_str().unwrap().contains(says), "{what}: {stats}");
    }
}

#[tokio::test]
async fn a_slow_download_goes_on_behind_readers_that_gave_up() {
    let dir = tempfile::tempdir().unwrap();
    let (pack, files) = version_1(dir.path());
    let server = Server::start(std::fs::read(&pack).unwrap()).await;
    let own_options = StoreOptions { demand_deadline: Duration::from_millis(300), ..options() };
    let tree = mounted(PackSource::Url(server.url()), None, own_options);
    // Four requests tell what it is and how long; then the host wants a second of peace.
    server.fail_next([Fault::Fine, Fault::Fine, Fault::Fine, Fault::Fine, Fault::Status(503, Some(1))]);
    let started = Instant::now();
    let mut refusals = 0;
    let found = loop {
        match walk(&tree, "o/n/v1/vmstate").await {
            Ok(found) => break found,
            Err(error) => assert_eq!(error, Errno::AGAIN, "{}", stats(&tree).await),
        }
        refusals += 1;
        assert!(started.elapsed() < Duration::from_secs(20), "{refusals}: {}", stats(&tree).await);
    };
    assert_eq!(tree.read(found.inode, 0, 100).await.unwrap(), files["vmstate"]);
    assert!(refusals > 0, "the download takes longer than one deadline");
    assert_eq!(stats(&tree).await["last_error"].as_str().map(|text| text.contains("try again")), Some(true));
}
