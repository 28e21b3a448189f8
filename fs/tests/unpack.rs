//! Unpacking: the same files with the same holes, or an error and a reason.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use forkd_fs::store::{PackLocation, PackSource, ReadError, Store};
use forkd_fs::unpack::{UnpackError, unpack};

mod support;
use support::server::{Fault, Server};
use support::{Fixture, noise, options};

fn check(fixture: &Fixture, dest: &Path) {
    for (name, plain) in &fixture.files {
        assert!(std::fs::read(dest.join(name)).unwrap() == *plain, "{name}");
    }
    assert_eq!(std::fs::read_dir(dest).unwrap().count(), fixture.files.len());
    let image = std::fs::metadata(dest.join("memory.bin")).unwrap();
    assert!(image.blocks() * 512 < image.len() * 3 / 4, "zeros are holes");
}

#[tokio::test]
async fn from_a_file_and_from_a_server_that_stumbles() {
    let fixture = Fixture::new();
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let local = Store::open(fixture.local(), options()).await.unwrap();
    let manifest = unpack(&local, one.path(), &|_| ()).await.unwrap();
    assert_eq!(*manifest, fixture.summary.manifest);
    check(&fixture, one.path());

    let server = Server::start(fixture.bytes()).await;
    let remote = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    server.fail_next([Fault::Reset, Fault::ShortBody, Fault::Status(503, None)]);
    let last = std::sync::Mutex::new(None);
    unpack(&remote, two.path(), &|progress| *last.lock().unwrap() = Some(progress)).await.unwrap();
    check(&fixture, two.path());
    let last = last.into_inner().unwrap().unwrap();
    assert_eq!(last.chunks_fetched, last.chunks_total);
}

#[tokio::test]
async fn damage_in_the_pack_is_never_written_as_data() {
    let fixture = Fixture::new();
    let mut bytes = fixture.bytes();
    let store = Store::open(fixture.local(), options()).await.unwrap();
    let rootfs = store.index().file("rootfs.erofs").unwrap();
    let (id, record) = store.index().stored_chunks(rootfs).next().unwrap();
    bytes[record.offset as usize + 7] ^= 0x10;
    let damaged = fixture.dir.path().join("damaged");
    std::fs::write(&damaged, bytes).unwrap();
    let location = PackLocation { source: PackSource::Path(damaged), ..fixture.local() };
    let store = Store::open(location, options()).await.unwrap();
    let out = tempfile::tempdir().unwrap();
    let failed = unpack(&store, out.path(), &|_| ()).await.unwrap_err();
    let UnpackError::Read { source, .. } = failed else { panic!("{failed:?}") };
    let ReadError::Corrupt { file, chunk, .. } = *source else { panic!("{source:?}") };
    assert_eq!((file.as_str(), chunk), ("rootfs.erofs", id.chunk));
}

/// A well-formed pack whose manifest lies about a file: index and frames are in order, the end-to-end digest is not.
#[tokio::test]
async fn a_manifest_that_lies_is_caught() {
    let other = Fixture::with(&[("memory.bin", noise(1, 100_000)), ("vmstate", b"same".to_vec())]);
    let from = other.dir.path().join("snapshot");
    // The lie: pack contents that are swapped under the writer after its survey, same length and time.
    let vmstate = from.join("vmstate");
    let time = std::fs::metadata(&vmstate).unwrap().modified().unwrap();
    let swap = |progress: forkd_fs::writer::PackProgress| {
        if progress.pass == forkd_fs::writer::Pass::Scan && progress.done == progress.total {
            use std::os::unix::fs::FileExt;
            let file = std::fs::File::options().write(true).open(&vmstate).unwrap();
            file.write_all_at(b"SAME", 0).unwrap();
            file.set_modified(time).unwrap();
        }
    };
    let out = other.dir.path().join("lying.tar.zst");
    forkd_fs::writer::PackWriter::default().write(&from, support::manifest(), &out, &swap).unwrap();
    let location = PackLocation { source: PackSource::Path(out), ..other.local() };
    let store = Store::open(location, options()).await.unwrap();
    let dest = tempfile::tempdir().unwrap();
    let failed = unpack(&store, dest.path(), &|_| ()).await.unwrap_err();
    assert!(matches!(failed, UnpackError::Digest { name, .. } if name == "vmstate"));
}

#[tokio::test]
async fn places_that_cannot_be_written_are_named() {
    let fixture = Fixture::new();
    let store = Store::open(fixture.local(), options()).await.unwrap();
    let nowhere = fixture.dir.path().join("none");
    assert!(matches!(unpack(&store, &nowhere, &|_| ()).await, Err(UnpackError::Write { .. })));
    let out = tempfile::tempdir().unwrap();
    std::fs::write(out.path().join("memory.bin"), b"precious").unwrap();
    assert!(matches!(unpack(&store, out.path(), &|_| ()).await, Err(UnpackError::Write { .. })));
    assert_eq!(std::fs::read(out.path().join("memory.bin")).unwrap(), b"precious", "nothing is overwritten");
}
