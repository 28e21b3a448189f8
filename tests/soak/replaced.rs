//! One tag replaced over and over by several pulls at once: whoever reads it sees one version or the other, whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use forkd_fs::digest::Digest;

use crate::scaled;
use crate::support::{Hub, Lab};

const MEMBERS: [&str; 5] = ["snapshot.json", "vmstate", "trace", "memory.bin", "rootfs.erofs"];

/// What the members of a version hash to.
type Version = BTreeMap<&'static str, Digest>;

#[derive(Debug, Default)]
struct Counts {
    pulls: AtomicU64,
    seen_whole: AtomicU64,
    went_away: AtomicU64,
    packed: AtomicU64,
    refused: AtomicU64,
}

fn version(dir: &Path) -> Version {
    MEMBERS.into_iter().map(|member| (member, Digest::of(&fs::read(dir.join(member)).unwrap()))).collect()
}

/// A laboratory with two packages of which every member differs but the configuration, and what their members are.
fn two_versions() -> (Lab, Vec<Version>) {
    let lab = Lab::new();
    let make = |tag: &str| {
        let dir = lab.snapshot(tag, 4);
        fs::write(dir.join("rootfs.erofs"), tag.repeat(50_000)).unwrap();
        lab.hub_dir(tag);
        version(&dir)
    };
    let versions = ["a", "bb"].map(make).to_vec();
    (lab, versions)
}

/// Replaces the tag `t` by three pulls at a time, over and over, while `reader` runs again and again.
fn replace_while(reader: impl Fn(&Lab, &[Version], &Counts) + Sync) -> Counts {
    let time = scaled(Duration::from_secs(5), Duration::from_secs(300));
    let (lab, versions) = two_versions();
    let hub = Hub::start(&lab, &[]);
    let (end, counts) = (Instant::now() + time, Counts::default());
    lab.run(&["pull", "lab/a", "--tag", "t", "--hub", &hub.url()]).ok();
    std::thread::scope(|scope| {
        for reference in ["lab/a", "lab/bb", "lab/bb"] {
            let (lab, hub, counts) = (&lab, &hub, &counts);
            scope.spawn(move || {
                while Instant::now() < end {
                    lab.run(&["pull", reference, "--tag", "t", "--force", "--hub", &hub.url()]).ok();
                    counts.pulls.fetch_add(1, Relaxed);
                }
            });
        }
        while Instant::now() < end {
            reader(&lab, &versions, &counts);
        }
    });
    println!("{time:?}: {counts:?}");
    assert!(versions.contains(&version(&lab.snapshot_dir("t"))));
    lab.run(&["cleanup"]).ok();
    let names = fs::read_dir(lab.path("data/forkd/snapshots")).unwrap();
    let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["a", "bb", "t"], "drafts were left");
    counts
}

#[test]
fn a_tag_that_is_replaced_all_the_time_is_never_torn() {
    let counts = replace_while(|lab, versions, counts| look(&lab.snapshot_dir("t"), versions, counts));
    assert!(counts.pulls.load(Relaxed) > 3 && counts.seen_whole.load(Relaxed) > 3, "{counts:?}");
}

#[test]
fn a_pack_of_a_tag_that_is_replaced_all_the_time_is_of_one_version() {
    let counts = replace_while(pack);
    assert!(counts.packed.load(Relaxed) > 3, "{counts:?}");
}

/// Opens the directory, then its members in it, as a fork does; all of them are of one version or it has just gone.
fn look(dir: &Path, versions: &[Version], counts: &Counts) {
    // The tag itself is there at every moment.
    let held = File::open(dir).expect("the tag is never absent");
    let inside = format!("/proc/self/fd/{}", held.as_raw_fd());
    let mut files = Vec::new();
    for member in MEMBERS {
        match File::open(Path::new(&inside).join(member)) {
            Ok(file) => files.push((member, file)),
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{member}: {error}");
                counts.went_away.fetch_add(1, Relaxed);
                return;
            }
        }
    }
    let digest = |mut file: File| {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        Digest::of(&bytes)
    };
    let found: Version = files.into_iter().map(|(member, file)| (member, digest(file))).collect();
    assert!(versions.contains(&found), "a mixture: {found:?}");
    counts.seen_whole.fetch_add(1, Relaxed);
}

/// `forkd pack` of the tag: a pack of one version, or a refusal because it changed.
fn pack(lab: &Lab, versions: &[Version], counts: &Counts) {
    let (out, taken) = (lab.path("work/t.tar.zst"), lab.path("work/taken"));
    let run = lab.run(&["pack", "--tag", "t", "--chunk", "64KiB", "--force", "--out", out.to_str().unwrap()]);
    if run.code != Some(0) {
        counts.refused.fetch_add(1, Relaxed);
        return;
    }
    fs::create_dir_all(&taken).unwrap();
    let mut tar = std::process::Command::new("tar");
    assert!(tar.arg("--zstd").arg("-xf").arg(&out).arg("-C").arg(&taken).status().unwrap().success());
    let whole = MEMBERS.iter().all(|member| taken.join(member).exists());
    assert!(whole && versions.contains(&version(&taken)), "a pack of a mixture");
    fs::remove_dir_all(&taken).unwrap();
    counts.packed.fetch_add(1, Relaxed);
}
