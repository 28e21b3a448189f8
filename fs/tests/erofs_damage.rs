//! What mkfs.erofs does not make is refused without a panic, a hang or a large allocation.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::time::Instant;

use bytes::Bytes;
use forkd_fs::erofs::{ErofsError, ErofsImage, ErofsInode, ReadImage};
use futures_util::FutureExt;
use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

mod support;
use support::{mkfs, noise};

/// An image in memory that checks what it is asked for.
struct InMemory(Vec<u8>);

impl ReadImage for InMemory {
    type Error = std::convert::Infallible;

    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    async fn read(&self, offset: u64, len: u64) -> Result<Bytes, Self::Error> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.size()), "{offset}+{len}");
        Ok(Bytes::copy_from_slice(&self.0[offset as usize..(offset + len) as usize]))
    }
}

type Refused = ErofsError<std::convert::Infallible>;

/// Looks at everything reachable, as a `find | xargs cat` would, and counts it. Each directory is entered by lookup.
async fn visit(image: Vec<u8>) -> Result<usize, Refused> {
    let image = ErofsImage::open(InMemory(image)).await?;
    let root = image.node(image.root()).await?;
    let (mut left, mut seen) = (vec![root], 0);
    while let Some(directory) = left.pop() {
        let mut position = 0;
        loop {
            // A directory that cannot be read must not keep the others from being looked at.
            let Ok(entries) = image.entries_from(&directory, position).await else { break };
            let Some(last) = entries.last() else { break };
            assert!(last.next > position, "listing goes on");
            position = last.next;
            for entry in entries {
                seen += 1;
                assert!(seen < 100_000, "there is no end to it");
                if let Ok(Some(node)) = image.lookup(&directory, &entry.name).await {
                    look_at(&image, &node).await;
                    if node.is_directory() {
                        left.push(node);
                    }
                }
            }
        }
    }
    Ok(seen)
}

async fn look_at(image: &ErofsImage<InMemory>, node: &ErofsInode) {
    for offset in [0, 4000, node.size / 2, node.size.saturating_sub(10), u64::MAX - 5] {
        if let Ok(bytes) = image.read(node, offset, 70_000).await {
            assert_eq!(bytes.len() as u64, node.size.saturating_sub(offset).min(70_000));
        }
    }
    if node.is_symlink()
        && let Ok(target) = image.link_target(node).await
    {
        assert!((1..4096).contains(&target.len()));
    }
}

fn visit_now(image: Vec<u8>) -> Result<usize, Refused> {
    visit(image).now_or_never().expect("memory never waits")
}

/// A small image with every kind of inode and layout in it.
fn small_image(args: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("a/b/c")).unwrap();
    for n in 0..30 {
        fs::write(at("a").join(format!("file {n}")), noise(n, n as usize * 61)).unwrap();
    }
    fs::write(at("two blocks"), noise(9, 9000)).unwrap();
    (0..200).for_each(|n| drop(File::create(at("a/b").join(format!("{n:040}"))).unwrap()));
    symlink("a/b", at("link")).unwrap();
    fs::hard_link(at("two blocks"), at("a/b/c/again")).unwrap();
    mknodat(CWD, at("null"), FileType::CharacterDevice, Mode::RWXU, makedev(1, 3)).unwrap();
    mkfs(dir.path(), args)
}

const SMALL: [&[&str]; 3] = [&[], &["--chunksize=4096", "-Eforce-chunk-indexes"], &["-zlz4"]];

#[test]
fn random_damage_is_survived() {
    // Where the structure is: the superblock, inodes and directories; contents are just bytes.
    for args in SMALL {
        let good = small_image(args);
        let whole = visit_now(good.clone()).unwrap();
        assert!(whole > 230, "{whole}");
        let mut rng = fastrand::Rng::with_seed(7);
        let started = Instant::now();
        for _ in 0..4000 {
            let mut image = good.clone();
            for _ in 0..rng.usize(1..12) {
                let at = rng.usize(1024..image.len());
                let value = [0, 1, 0x7f, 0x80, 0xff, rng.u8(..)][rng.usize(..6)];
                image[at..][..1].fill(value);
                if rng.bool() {
                    let len = rng.usize(1..8).min(image.len() - at);
                    image[at..at + len].fill(value);
                }
            }
            if rng.u8(..) < 20 {
                image.truncate(rng.usize(..good.len()));
            }
            let _ = visit_now(image);
        }
        println!("{args:?}: 4000 damaged images in {:?}", started.elapsed());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Nothing but an arbitrary inode: wherever it says its data lies, reads stay within the image.
    #[test]
    fn arbitrary_inodes_stay_within_the_image(raw in prop::collection::vec(any::<u8>(), 64), nid in 36u64..100) {
        let mut image = noise(5, 16 << 10);
        image[1024..1152].fill(0);
        image[1024..1028].copy_from_slice(&0xE0F5_E1E2u32.to_le_bytes());
        image[1024 + 12] = 12;
        let at = nid as usize * 32;
        image[at..at + 64].copy_from_slice(&raw);
        // Formats that mean something are rare by chance.
        image[at] &= 0x0f;
        image[at + 1] = 0;
        let check = async {
            let image = ErofsImage::open(InMemory(image)).await.unwrap();
            if let Ok(node) = image.node(nid).await {
                look_at(&image, &node).await;
                let _ = image.entries_from(&node, 0).await;
                let _ = image.find(&node, b"name").await;
            }
        };
        check.now_or_never().expect("memory never waits");
    }
}

/// Where a directory entry's inode number is in an image.
fn entry_at(image: &[u8], name: &[u8], nid: u64) -> usize {
    let names = image.windows(name.len()).position(|window| window == name).unwrap();
    let block = names & !4095;
    let found = (block..names).find(|&at| image[at..at + 8] == nid.to_le_bytes() && image[at + 11] == 0);
    found.expect("the entry is in the block of its name")
}

#[test]
fn directories_with_two_parents_and_names_that_are_paths_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("inner-name/leaf-name")).unwrap();
    let good = mkfs(dir.path(), &[]);
    let nids = async {
        let image = ErofsImage::open(InMemory(good.clone())).await.unwrap();
        let root = image.node(image.root()).await.unwrap();
        let inner = image.lookup(&root, b"inner-name").await.unwrap().unwrap();
        let leaf = image.lookup(&inner, b"leaf-name").await.unwrap().unwrap();
        (root.nid, inner.nid, leaf.nid)
    };
    let (root, inner, leaf) = nids.now_or_never().unwrap();
    // The leaf is the root, or its own parent.
    for other in [root, inner] {
        let mut image = good.clone();
        let at = entry_at(&image, b"leaf-name", leaf);
        image[at..at + 8].copy_from_slice(&other.to_le_bytes());
        assert_eq!(visit_now(image.clone()).unwrap(), 2, "both names are listed, the second is not entered");
        let found = async {
            let image = ErofsImage::open(InMemory(image)).await.unwrap();
            let inner = image.node(inner).await.unwrap();
            image.lookup(&inner, b"leaf-name").await
        };
        let found = found.now_or_never().unwrap();
        assert!(matches!(found, Err(ErofsError::Corrupt { nid, .. }) if nid == other), "{found:?}");
    }
    for (from, to) in
        [(&b"leaf-name"[..], &b"leaf/name"[..]), (b"leaf-name", b"/eaf-name"), (b"leaf-name", b"!eaf-name")]
    {
        let mut image = good.clone();
        let at = image.windows(from.len()).position(|window| window == from).unwrap();
        image[at..at + to.len()].copy_from_slice(to);
        // A slash is refused, and so is a name out of order.
        assert_eq!(visit_now(image).unwrap(), 1, "{}", String::from_utf8_lossy(to));
    }
}
