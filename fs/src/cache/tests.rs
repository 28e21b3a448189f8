//! Tests of the cache: sharing, damage, bounds and disks that refuse.

use super::*;

fn frame(seed: u8, len: usize) -> (Digest, Bytes) {
    let bytes = Bytes::from(vec![seed; len]);
    (Digest::of(&bytes), bytes)
}

fn open(dir: &Path) -> ChunkCache {
    ChunkCache::open(dir, CacheOptions { max_bytes: 100_000 })
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
        assert!(!cache.contains(digest), "removed");
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
    for (name, age) in [(".tmp-old", 7200), (".tmp-new", 10)] {
        let file = File::create(folder.join(name)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
    }
    let (digest, bytes) = frame(1, 10);
    cache.put(digest, bytes);
    cache.flush();
    assert!(!folder.join(".tmp-old").exists() && folder.join(".tmp-new").exists());
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
