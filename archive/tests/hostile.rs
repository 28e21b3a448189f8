//! Archives that mean harm, and what they reach: nothing outside of the directory.

use std::fs;
use std::io::{self, Cursor, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use forkd_archive::{UnpackError, Unpacker};
use proptest::prelude::*;
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

/// A directory with a secret beside the one that is unpacked into.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Place {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("in")).unwrap();
        fs::create_dir(dir.path().join("out")).unwrap();
        fs::write(dir.path().join("out/secret"), "secret").unwrap();
        Place { dir }
    }

    fn inside(&self) -> std::path::PathBuf {
        self.dir.path().join("in")
    }

    fn unpacker(&self) -> Unpacker {
        Unpacker::new(fs::File::open(self.inside()).unwrap().into())
    }

    fn unpack(&self, archive: impl Read) -> Result<forkd_archive::Totals, UnpackError> {
        self.unpacker().unpack(archive, &mut ())
    }

    fn assert_outside_is_untouched(&self) {
        let names: Vec<_> =
            fs::read_dir(self.dir.path().join("out")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["secret"]);
        let secret = self.dir.path().join("out/secret");
        assert_eq!(fs::read_to_string(&secret).unwrap(), "secret");
        assert_eq!(fs::metadata(&secret).unwrap().nlink(), 1);
        assert_eq!(fs::read_dir(self.dir.path()).unwrap().count(), 2);
    }

    fn assert_no_temporaries(&self) {
        for entry in fs::read_dir(self.inside()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(!name.starts_with(".forkd-cp"), "{name} is left");
        }
    }
}

/// One entry with its names as they are, not as a well-behaved library would write them.
fn entry(archive: &mut Vec<u8>, kind: EntryType, name: &[u8], link: &[u8], contents: &[u8]) {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o6755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_size(contents.len() as u64);
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
    header.set_cksum();
    archive.extend_from_slice(header.as_bytes());
    archive.extend_from_slice(contents);
    archive.resize(archive.len().next_multiple_of(512), 0);
}

/// Kind, name, target of a link, contents.
type Entry<'a> = (EntryType, &'a [u8], &'a [u8], &'a [u8]);

fn archive(entries: &[Entry<'_>]) -> Cursor<Vec<u8>> {
    let mut bytes = Vec::new();
    for (kind, name, link, contents) in entries {
        entry(&mut bytes, *kind, name, link, contents);
    }
    bytes.resize(bytes.len() + 1024, 0);
    Cursor::new(bytes)
}

const FILE: EntryType = EntryType::Regular;
const DIR: EntryType = EntryType::Directory;
const LINK: EntryType = EntryType::Symlink;
const HARD: EntryType = EntryType::Link;

#[test]
fn names_that_lead_out_are_refused() {
    let too_deep = b"d/".repeat(49);
    for name in
        [&b"../out/evil"[..], b"/tmp/forkd-evil", b"a/../../out/evil", b"..", b"a/..", b"./../out/evil"]
    {
        for kind in [FILE, DIR, LINK, HARD] {
            let place = Place::new();
            let result = place.unpack(archive(&[(kind, name, b"x", b"")]));
            assert!(matches!(result, Err(UnpackError::Name { .. })), "{kind:?} {name:?}: {result:?}");
            place.assert_outside_is_untouched();
        }
    }
    let place = Place::new();
    place.unpack(archive(&[(DIR, &too_deep, b"", b"")])).unwrap();
}

#[test]
fn no_file_goes_through_a_link() {
    for target in [&b"../out"[..], b"/", b"..", b".", b"/proc/self/cwd"] {
        for kind in [FILE, DIR, LINK, HARD] {
            let place = Place::new();
            let entries = [(LINK, &b"way"[..], target, &b""[..]), (kind, b"way/evil", b"way", b"")];
            let result = place.unpack(archive(&entries));
            assert!(matches!(result, Err(UnpackError::Make { .. })), "{kind:?} over {target:?}: {result:?}");
            place.assert_outside_is_untouched();
        }
    }
}

#[test]
fn links_that_are_there_are_replaced_and_not_followed() {
    let place = Place::new();
    symlink("../out/secret", place.inside().join("file")).unwrap();
    fs::hard_link(place.dir.path().join("out/secret"), place.inside().join("second")).unwrap();
    place.unpack(archive(&[(FILE, b"file", b"", b"new"), (FILE, b"second", b"", b"new")])).unwrap();
    place.assert_outside_is_untouched();
    for name in ["file", "second"] {
        assert_eq!(fs::read_to_string(place.inside().join(name)).unwrap(), "new");
    }
    // Over a link that was there before, too.
    symlink("../out", place.inside().join("way")).unwrap();
    assert!(place.unpack(archive(&[(FILE, b"way/evil", b"", b"")])).is_err());
    assert!(place.unpack(archive(&[(DIR, b"way", b"", b"")])).is_err());
    place.assert_outside_is_untouched();
}

#[test]
fn second_names_are_of_files_in_the_directory_only() {
    for target in [&b"../out/secret"[..], b"/etc/passwd", b"way/secret"] {
        let place = Place::new();
        let entries = [(LINK, &b"way"[..], &b"../out"[..], &b""[..]), (HARD, b"stolen", target, b"")];
        assert!(place.unpack(archive(&entries)).is_err(), "{target:?}");
        place.assert_outside_is_untouched();
        place.assert_no_temporaries();
    }
    let place = Place::new();
    // Of a link: the link itself, whose target stays closed.
    let entries = [
        (LINK, &b"way"[..], &b"../out/secret"[..], &b""[..]),
        (HARD, b"second", b"way", b""),
        (FILE, b"second", b"", b"mine"),
        (FILE, b"first", b"", b"1"),
        (HARD, b"again", b"first", b""),
        (HARD, b"again", b"first", b""),
    ];
    place.unpack(archive(&entries)).unwrap();
    place.assert_outside_is_untouched();
    place.assert_no_temporaries();
    assert_eq!(fs::metadata(place.inside().join("first")).unwrap().nlink(), 2);
    assert!(place.unpack(archive(&[(DIR, b"d", b"", b""), (HARD, b"e", b"d", b"")])).is_err());
    assert!(place.unpack(archive(&[(HARD, b"e", b"", b"")])).is_err());
}

#[test]
fn devices_are_refused() {
    for kind in [EntryType::Char, EntryType::Block, EntryType::Fifo, EntryType::new(b'Z')] {
        let place = Place::new();
        let result = place.unpack(archive(&[(kind, b"null", b"", b"")]));
        assert!(matches!(result, Err(UnpackError::Kind { .. })), "{kind:?}: {result:?}");
        assert!(!place.inside().join("null").exists());
    }
}

#[test]
fn set_user_id_is_dropped_unless_asked_for() {
    let place = Place::new();
    let bytes = archive(&[(FILE, b"su", b"", b"x"), (DIR, b"d", b"", b"")]);
    place.unpack(bytes.clone()).unwrap();
    let mode = |name: &str| fs::metadata(place.inside().join(name)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("su"), mode("d")), (0o755, 0o755));
    place.unpacker().with_set_ids().unpack(bytes, &mut ()).unwrap();
    assert_eq!(mode("su"), 0o6755);
}

#[test]
fn a_directory_that_is_there_keeps_its_mode() {
    let place = Place::new();
    fs::create_dir(place.inside().join("d")).unwrap();
    fs::set_permissions(place.inside().join("d"), fs::Permissions::from_mode(0o700)).unwrap();
    place.unpack(archive(&[(DIR, b"d", b"", b"")])).unwrap();
    let metadata = fs::metadata(place.inside().join("d")).unwrap();
    assert_eq!((metadata.permissions().mode() & 0o7777, metadata.mtime()), (0o700, 1));
}

#[test]
fn a_directory_and_a_file_do_not_replace_each_other() {
    let place = Place::new();
    place
        .unpack(archive(&[(DIR, b"d", b"", b""), (FILE, b"d/f", b"", b"1"), (FILE, b"f", b"", b"1")]))
        .unwrap();
    assert!(place.unpack(archive(&[(FILE, b"d", b"", b"2")])).is_err());
    assert!(place.unpack(archive(&[(LINK, b"d", b"f", b"")])).is_err());
    assert!(place.unpack(archive(&[(DIR, b"f", b"", b"")])).is_err());
    assert!(place.unpack(archive(&[(FILE, b"f/g", b"", b"")])).is_err());
    assert_eq!(fs::read_to_string(place.inside().join("d/f")).unwrap(), "1");
    place.assert_no_temporaries();
}

#[test]
fn what_breaks_off_leaves_the_old_file() {
    let place = Place::new();
    fs::write(place.inside().join("f"), "old").unwrap();
    let whole = archive(&[(FILE, b"f", b"", &[b'n'; 100_000])]).into_inner();
    for len in [513, 700, 50_000, 100_000] {
        let result = place.unpack(&whole[..len]);
        assert!(matches!(result, Err(UnpackError::Archive { .. })), "{len}: {result:?}");
        assert_eq!(fs::read_to_string(place.inside().join("f")).unwrap(), "old");
        place.assert_no_temporaries();
    }
    place.unpack(whole.as_slice()).unwrap();
    assert_eq!(fs::metadata(place.inside().join("f")).unwrap().len(), 100_000);
}

/// A header that announces `size` bytes, and then bytes without end.
fn endless(kind: u8, size: u64) -> impl Read {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::new(kind));
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.as_old_mut().name[0] = b'x';
    header.set_cksum();
    Cursor::new(header.as_bytes().to_vec()).chain(io::repeat(b'a'))
}

#[test]
fn what_stands_before_an_entry_has_a_limit() {
    // Long names, long links, PAX records, and a directory's contents, which it has none of.
    for kind in *b"LKx5" {
        let place = Place::new();
        let mut read = Counted(endless(kind, 8 << 30), 0);
        let result = place.unpack(&mut read);
        assert!(result.is_err(), "{}", char::from(kind));
        assert!(read.1 < 3 << 20, "{} bytes were read of {}", read.1, char::from(kind));
    }
    // Names of themselves too long, though within that limit.
    let mut bytes = Vec::new();
    let name = [b'n'; 5000];
    entry(&mut bytes, EntryType::GNULongName, b"././@LongLink", b"", &name);
    entry(&mut bytes, FILE, b"n", b"", b"");
    bytes.resize(bytes.len() + 1024, 0);
    assert!(matches!(Place::new().unpack(bytes.as_slice()), Err(UnpackError::Name { .. })));
}

struct Counted<R>(R, u64);

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.0.read(buffer)?;
        self.1 += n as u64;
        Ok(n)
    }
}

#[test]
fn an_archive_of_one_copy_holds_nothing_else() {
    for name in [&b"other"[..], b"rootless", b"./other", b"."] {
        let place = Place::new();
        let unpacker = place.unpacker().with_root(Some("copy".into()), false);
        let result = unpacker.unpack(archive(&[(FILE, name, b"", b"")]), &mut ());
        assert!(matches!(result, Err(UnpackError::Name { .. })), "{name:?}: {result:?}");
        assert_eq!(fs::read_dir(place.inside()).unwrap().count(), 0);
    }
    let place = Place::new();
    let only_directory = place.unpacker().with_root(Some("copy".into()), true);
    let result = only_directory.unpack(archive(&[(FILE, b"root", b"", b"")]), &mut ());
    assert!(matches!(result, Err(UnpackError::NoDirectory { .. })), "{result:?}");
}

/// Everything below a directory, by name.
fn tree(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        found.push(entry.file_name().to_string_lossy().into_owned());
        if entry.file_type().unwrap().is_dir() {
            found.extend(tree(&entry.path()));
        }
    }
    found
}

fn any_name() -> impl Strategy<Value = Vec<u8>> {
    let part = prop::sample::select(vec!["a", "b", "..", ".", "", "link", "\0", "root", "out", "secret"]);
    prop::collection::vec(part, 1..5).prop_map(|parts| parts.join("/").into_bytes())
}

fn any_kind() -> impl Strategy<Value = EntryType> {
    prop::sample::select(b"0012533467LKxgSZ\0".to_vec()).prop_map(EntryType::new)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn nothing_outside_changes_whatever_the_archive_says(
        entries in prop::collection::vec((any_kind(), any_name(), any_name(), prop::collection::vec(any::<u8>(), 0..40)), 1..12),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
    ) {
        let place = Place::new();
        let mut bytes = Vec::new();
        for (kind, name, link, contents) in &entries {
            entry(&mut bytes, *kind, name, link, contents);
        }
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.resize(bytes.len() + 1024, 0);
        let _ = place.unpack(bytes.as_slice());
        place.assert_outside_is_untouched();
        for name in tree(&place.inside()) {
            prop_assert!(!name.starts_with(".forkd-cp"), "{} is left", name);
        }
    }
}

#[test]
fn well_behaved_archives_of_others_are_taken() {
    let place = Place::new();
    let mut builder = Builder::new(Vec::new());
    let mut header = Header::new_ustar();
    header.set_size(3);
    header.set_mode(0o640);
    header.set_mtime(1_000_000_000);
    header.set_uid(0);
    header.set_gid(0);
    builder.append_data(&mut header, "deep/down/f", &b"abc"[..]).unwrap();
    place.unpack(builder.into_inner().unwrap().as_slice()).unwrap();
    let metadata = fs::metadata(place.inside().join("deep/down/f")).unwrap();
    assert_eq!(
        (metadata.permissions().mode() & 0o7777, metadata.mtime(), metadata.len()),
        (0o640, 1_000_000_000, 3)
    );
}
