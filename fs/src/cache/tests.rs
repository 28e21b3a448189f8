//! Tests of the cache: sharing, damage, bounds and disks that refuse.

use std::fs::{self, File};
use std::time::{Duration, SystemTime};

use super::*;
use rustix::fs::{FlockOperation, flock};

fn frame(seed: u8, len: usize) -> (Digest, Bytes) {
    let bytes = Bytes::from(vec![seed; len]);
    (Digest::of(&bytes), bytes)
}

fn open(dir: &Path) -> ChunkCache {
    ChunkCache::open(dir, CacheOptions { max_bytes: 100_000, min_free_bytes: Some(0) })
}

#[test]
fn what_was_put_is_had_by_another_cache_on_the_same_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (digest, bytes) = frame(1, 5000);
    let (one, two) = (open(dir.path()), open(dir.path()));
    assert!(one.get(digest, 5000).is_none() && !one.contains(digest));
    one.put(digest, bytes.clone());
    one.flush();
    assert!(two.contains(digest));
    assert_eq!(two.get(digest, 5000), Some(bytes));
}

#[test]
fn dropping_writes_what_is_queued() {
    let dir = tempfile::tempdir().unwrap();
    let frames: Vec<_> = (0..=255).map(|seed| frame(seed, 100)).collect();
    let cache = open(dir.path());
    frames.iter().for_each(|(digest, bytes)| cache.put(*digest, bytes.clone()));
    drop(cache);
    let cache = open(dir.path());
    assert!(frames.iter().all(|(digest, bytes)| cache.get(*digest, 100).as_ref() == Some(bytes)));
}

#[test]
fn damaged_entries_are_misses_and_go_away() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let (digest, bytes) = frame(1, 5000);
    let path = cache.disk.as_ref().unwrap().path(digest);
    for damage in [&b""[..], &[1; 4999], &[1; 5001], &[2; 5000]] {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, damage).unwrap();
        assert!(cache.contains(digest));
        assert!(cache.get(digest, 5000).is_none());
        assert!(!cache.contains(digest) && cache.contents().damaged == 1, "put aside");
    }
    cache.put(digest, bytes.clone());
    cache.flush();
    assert_eq!(cache.get(digest, 5000), Some(bytes), "and can be put again");
}

#[test]
fn the_longest_unused_make_room() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let frames: Vec<_> = (0..40).map(|seed| frame(seed, 5000)).collect();
    for (age, (digest, bytes)) in frames.iter().rev().enumerate() {
        cache.put(*digest, bytes.clone());
        cache.flush();
        // Later frames count as used longer ago.
        if let Ok(file) = File::open(cache.disk.as_ref().unwrap().path(*digest)) {
            file.set_modified(SystemTime::now() - Duration::from_secs(10_000 - age as u64 * 10)).unwrap();
        }
    }
    let kept: Vec<bool> = frames.iter().map(|(digest, _)| cache.contains(*digest)).collect();
    assert!(kept.iter().filter(|&&kept| kept).count() * 5000 <= 100_000 + 100_000 / 16 + 5000);
    assert!(kept[..10].iter().all(|&kept| kept) && !kept[39], "the recent ones stay: {kept:?}");
}

#[test]
fn what_dead_processes_left_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let folder = dir.path().join("chunks/aa");
    fs::create_dir_all(&folder).unwrap();
    let made = |name: &str, age| {
        let file = File::create(folder.join(name)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        file
    };
    let (living, _new) = (made(".tmp-living", 7200), made(".tmp-new", 0));
    flock(&living, FlockOperation::NonBlockingLockExclusive).unwrap();
    let left = || [".tmp-dead", ".tmp-living", ".tmp-new"].map(|name| folder.join(name).exists());
    drop(made(".tmp-dead", 5));
    let (digest, bytes) = frame(1, 10);
    cache.put(digest, bytes);
    cache.flush();
    assert_eq!(left(), [false, true, true], "the first write looks at what is there");
    drop(made(".tmp-dead", 5));
    assert_eq!(cache.remove_abandoned().unwrap(), RemovedFiles { files: 1, bytes: 0 });
    assert_eq!(left(), [false, true, true]);
}

#[test]
fn an_unusable_directory_keeps_nothing_and_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let in_the_way = dir.path().join("file");
    fs::write(&in_the_way, b"").unwrap();
    let cache = open(&in_the_way);
    let (digest, bytes) = frame(1, 10);
    cache.put(digest, bytes);
    cache.flush();
    assert!(!cache.contains(digest) && cache.get(digest, 10).is_none());
}

/// A folder that cannot be made fails like a disk that is full: in the write, after the cache was opened.
#[test]
fn a_disk_that_refuses_writes_is_survived() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let (digest, bytes) = frame(1, 10);
    let folder = cache.disk.as_ref().unwrap().path(digest).parent().unwrap().to_owned();
    fs::write(&folder, b"in the way").unwrap();
    cache.put(digest, bytes.clone());
    cache.flush();
    assert!(!cache.contains(digest));
    fs::remove_file(&folder).unwrap();
    cache.put(digest, bytes);
    cache.flush();
    assert!(cache.contains(digest), "tries again once the disk accepts");
}

#[test]
fn the_cache_yields_to_a_disk_that_is_nearly_full() {
    let dir = tempfile::tempdir().unwrap();
    let roomy = open(dir.path());
    let frames: Vec<_> = (0..4).map(|seed| frame(seed, 5000)).collect();
    frames[..3].iter().for_each(|(digest, bytes)| roomy.put(*digest, bytes.clone()));
    roomy.flush();
    // No disk has so much free: like one that others have filled.
    let options = CacheOptions { max_bytes: 100_000, min_free_bytes: Some(u64::MAX) };
    let tight = ChunkCache::open(dir.path(), options);
    assert!(tight.get(frames[0].0, 5000).is_some(), "what is there is read");
    tight.put(frames[3].0, frames[3].1.clone());
    tight.flush();
    assert_eq!(tight.contents().entries, 0, "nothing is added, and the space goes to others");
    roomy.put(frames[3].0, frames[3].1.clone());
    roomy.flush();
    assert!(roomy.contains(frames[3].0));
}

#[test]
fn verify_puts_damaged_frames_aside_and_collect_removes_them() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    let frames: Vec<_> = (0..3).map(|seed| frame(seed, 5000)).collect();
    frames.iter().for_each(|(digest, bytes)| cache.put(*digest, bytes.clone()));
    cache.flush();
    let path = cache.disk.as_ref().unwrap().path(frames[1].0);
    fs::write(&path, b"not that").unwrap();
    let verified = cache.verify(&|_| ());
    assert_eq!(verified, CacheCheck { entries: 3, bytes: 10_008, damaged: 1 });
    assert!(cache.contains(frames[0].0) && !cache.contains(frames[1].0) && cache.contains(frames[2].0));
    assert_eq!(cache.collect(false).unwrap(), RemovedFiles { files: 1, bytes: 8 });
    let contents = cache.contents();
    assert_eq!((contents.entries, contents.bytes, contents.damaged), (2, 10_000, 0));
    assert_eq!(cache.collect(true).unwrap(), RemovedFiles { files: 2, bytes: 10_000 });
    assert_eq!(cache.verify(&|_| ()), CacheCheck::default());
}

#[test]
fn collect_brings_a_cache_under_a_smaller_limit() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path());
    (0..10).map(|seed| frame(seed, 5000)).for_each(|(digest, bytes)| cache.put(digest, bytes));
    cache.flush();
    let smaller = CacheOptions { max_bytes: 20_000, min_free_bytes: Some(0) };
    let removed = ChunkCache::open(dir.path(), smaller).collect(false).unwrap();
    assert_eq!(removed, RemovedFiles { files: 6, bytes: 30_000 });
}
