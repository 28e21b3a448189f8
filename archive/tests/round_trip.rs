//! What is packed comes out the same.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use forkd_archive::{Owners, PackError, ROOT, Totals, Unpacker, Watcher, pack};
use tempfile::TempDir;

fn packed(source: &Path, follow: bool) -> (Vec<u8>, Totals) {
    let mut bytes = Vec::new();
    let totals = pack(source, ROOT, follow, &mut bytes, &mut ()).unwrap();
    (bytes, totals)
}

fn unpacked(bytes: &[u8], into: &Path) {
    let directory = File::open(into).unwrap().into();
    let owners = if rustix::process::geteuid().is_root() { Owners::Kept } else { Owners::Ours };
    let unpacker =
        Unpacker::new(directory).with_root(Some("copy".into()), false).with_owners(owners).with_set_ids();
    unpacker.unpack(bytes, &mut ()).unwrap();
}

/// Kind, mode, owner, time, and contents or target of everything in a tree, as another program tells them.
fn listing(dir: &Path) -> String {
    let script =
        "find . -printf '%y %m %U %G %Ts %P %l\\n' | sort; find . -type f -exec sha256sum {} + | sort";
    let output = Command::new("sh").args(["-c", script]).current_dir(dir).output().unwrap();
    assert!(output.status.success());
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn tree(dir: &Path) {
    fs::create_dir_all(dir.join("sub/empty")).unwrap();
    fs::write(dir.join("file"), "contents").unwrap();
    fs::write(dir.join("nothing"), "").unwrap();
    fs::write(dir.join("block"), vec![7; 512]).unwrap();
    fs::write(dir.join("sub/large"), (0..3_000_001u32).map(|i| (i % 251) as u8).collect::<Vec<_>>()).unwrap();
    symlink("file", dir.join("link")).unwrap();
    symlink("../../nowhere//./odd", dir.join("sub/dangling")).unwrap();
    symlink(format!("/{}", "t".repeat(300)), dir.join("sub/long-target")).unwrap();
    fs::hard_link(dir.join("file"), dir.join("sub/second")).unwrap();
    let long = dir.join("x".repeat(200)).join("y".repeat(250));
    fs::create_dir_all(&long).unwrap();
    fs::write(long.join("z".repeat(255)), "long").unwrap();
    fs::hard_link(long.join("z".repeat(255)), dir.join("zz")).unwrap();
    fs::write(dir.join(std::ffi::OsStr::new("line\nbreak \u{e9}")), "odd").unwrap();
    let bytes = std::os::unix::ffi::OsStrExt::from_bytes;
    fs::write(dir.join::<&std::ffi::OsStr>(bytes(b"not \xff utf-8")), "odd").unwrap();
    for (name, mode) in [("file", 0o4751), ("sub/empty", 0o1777), ("sub", 0o555), ("nothing", 0)] {
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    Command::new("sh")
        .args(["-c", "find . -exec touch -h -d @1234567890 {} +"])
        .current_dir(dir)
        .status()
        .unwrap();
}

#[test]
fn a_tree_comes_out_as_it_went_in() {
    let (source, into) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let tree_dir = source.path().join("tree");
    fs::create_dir(&tree_dir).unwrap();
    tree(&tree_dir);
    let (bytes, totals) = packed(&tree_dir, false);
    unpacked(&bytes, into.path());
    let copy = into.path().join("copy");
    assert_eq!(listing(&copy), listing(&tree_dir));
    assert_eq!(
        fs::metadata(copy.join("file")).unwrap().ino(),
        fs::metadata(copy.join("sub/second")).unwrap().ino()
    );
    assert!(totals.entries > 15, "{totals:?}");
    // Again, over what is there.
    unpacked(&bytes, into.path());
    assert_eq!(listing(&copy), listing(&tree_dir));
}

#[test]
fn tar_itself_understands_it() {
    let (source, into) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let tree_dir = source.path().join("tree");
    fs::create_dir(&tree_dir).unwrap();
    tree(&tree_dir);
    sparse(&tree_dir.join("holes"));
    Command::new("touch")
        .args(["-d", "@1234567890"])
        .arg(tree_dir.join("holes"))
        .arg(&tree_dir)
        .status()
        .unwrap();
    let (bytes, _) = packed(&tree_dir, false);
    let mut tar = Command::new("tar")
        .args(["-xpf", "-", "-C"])
        .arg(into.path())
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    tar.stdin.take().unwrap().write_all(&bytes).unwrap();
    assert!(tar.wait().unwrap().success());
    assert_eq!(listing(&into.path().join(ROOT)), listing(&tree_dir));
}

/// A gigabyte, almost all of it holes.
fn sparse(path: &Path) {
    let file = File::create(path).unwrap();
    for piece in 0..40u64 {
        file.write_all_at(&[piece as u8 + 1; 5000], piece * (25 << 20)).unwrap();
    }
    file.set_len(1 << 30).unwrap();
}

#[test]
fn holes_stay_holes() {
    let (source, into) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let path = source.path().join("holes");
    sparse(&path);
    let (bytes, totals) = packed(&path, false);
    assert!(bytes.len() < 1 << 20, "{} bytes for a file of holes", bytes.len());
    assert_eq!(totals, Totals { entries: 1, bytes: 1 << 30 });
    unpacked(&bytes, into.path());
    let copy = into.path().join("copy");
    let metadata = fs::metadata(&copy).unwrap();
    assert_eq!(metadata.len(), 1 << 30);
    assert!(metadata.blocks() * 512 < 8 << 20, "{} blocks", metadata.blocks());
    assert!(Command::new("cmp").arg(&path).arg(&copy).status().unwrap().success());
}

#[test]
fn a_link_is_copied_or_followed() {
    let (source, into) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::create_dir(source.path().join("d")).unwrap();
    fs::write(source.path().join("d/f"), "x").unwrap();
    symlink("d", source.path().join("link")).unwrap();
    let (bytes, _) = packed(&source.path().join("link"), false);
    unpacked(&bytes, into.path());
    assert!(into.path().join("copy").is_symlink());
    fs::remove_file(into.path().join("copy")).unwrap();
    let (bytes, _) = packed(&source.path().join("link"), true);
    unpacked(&bytes, into.path());
    assert_eq!(fs::read_to_string(into.path().join("copy/f")).unwrap(), "x");
}

#[test]
fn what_cannot_be_copied_is_left_out_and_named() {
    struct Names(Vec<String>);
    impl Watcher for Names {
        fn at(&mut self, _: Totals) {}
        fn left_out(&mut self, path: &Path, _: &str) {
            self.0.push(path.file_name().unwrap().to_str().unwrap().to_owned());
        }
    }
    let source = TempDir::new().unwrap();
    let _socket = UnixListener::bind(source.path().join("socket")).unwrap();
    Command::new("mkfifo").arg(source.path().join("fifo")).status().unwrap();
    let mut names = Names(Vec::new());
    let totals = pack(source.path(), ROOT, false, &mut Vec::new(), &mut names).unwrap();
    assert_eq!((totals.entries, names.0), (1, vec!["fifo".to_owned(), "socket".to_owned()]));
    let result = pack(&source.path().join("fifo"), ROOT, false, &mut Vec::new(), &mut ());
    assert!(matches!(result, Err(PackError::Special { .. })), "{result:?}");
    let result = pack(Path::new("/no/such"), ROOT, false, &mut Vec::new(), &mut ());
    assert!(matches!(result, Err(PackError::Read { .. })), "{result:?}");
}
