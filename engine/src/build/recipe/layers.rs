//! What the steps of a root disk have made, kept by the digest of all that went into it: a change repeats the steps behind
//! it and no others, and an interrupted build goes on behind the last one that was finished.
//!
//! ```text
//! KEY.base.tar    the distribution's tree
//! KEY.layer.tar   what one later step changed: an incremental archive of tar
//! ```
//!
//! The key of a step is the hash of the key before it and of its own digest. An archive gets its name when it is
//! complete and on disk.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::error::RecipeError;
use super::kept;
use super::site::Site;
use super::steps::Step;
use super::tree::RootDiskTree;
use crate::build::tools::sha256_parts;

/// The key of each step.
pub(super) fn keys(steps: &[Step<'_>]) -> Result<Vec<String>, RecipeError> {
    let mut keys: Vec<String> = Vec::new();
    for step in steps {
        let digest = step.digest()?;
        keys.push(match keys.last() {
            None => digest,
            Some(before) => sha256_parts([before.as_bytes(), digest.as_bytes()]),
        });
    }
    Ok(keys)
}

/// Makes the tree, from what is kept as far as it goes. Returns the time (seconds since 1970) of its newest packaged file.
pub(super) fn make_tree(
    site: &Site<'_>,
    cache: &Path,
    steps: &[Step<'_>],
    keys: &[String],
) -> Result<u64, RecipeError> {
    let mut epoch = 0;
    for (at, (step, key)) in steps.iter().zip(keys).enumerate() {
        let kind = if at == 0 { "base" } else { "layer" };
        let archive = cache.join(format!("{}.{kind}.tar", &key[..32]));
        let started = SystemTime::now();
        let kept = step.is_kept() && archive.is_file();
        match (kept, at) {
            (true, _) => {
                kept::note_use(&archive);
                unpack(site, &archive, at == 0)?;
            }
            (false, 0) => step.apply(site)?,
            (false, _) if step.is_kept() => {
                let list = mark(site)?;
                step.apply(site)?;
                keep(site, &archive, Some(&list), 0)?;
            }
            (false, _) => step.apply(site)?,
        }
        if at == 0 {
            let before = if kept { SystemTime::now() } else { started };
            epoch = newest_file(&site.tree(), before)?;
            if !kept {
                keep(site, &archive, None, epoch)?;
            }
        }
    }
    Ok(epoch)
}

/// Python trusts compiled code only while its source has the time it had when it was compiled, so times of packaged files
/// stay; what the installation made gets the newest of those.
fn newest_file(tree: &Path, before: SystemTime) -> Result<u64, RecipeError> {
    let newest = RootDiskTree::open(tree).and_then(|tree| tree.newest_file(before));
    newest.map_err(RecipeError::file(tree))
}

fn unpack(site: &Site<'_>, archive: &Path, first: bool) -> Result<(), RecipeError> {
    let step = "unpacking what an earlier build has made";
    site.say(step);
    let tree = site.tree();
    if first {
        fs::create_dir(&tree).map_err(RecipeError::file(&tree))?;
    }
    let tar = site.tar("--extract", archive, &tree).arg("--preserve-permissions");
    // This way it also removes what the step had removed.
    let tar = if first { tar } else { tar.arg("--listed-incremental=/dev/null") };
    tar.run(|_| {}).map_err(RecipeError::tool(step))
}

/// Notes what is in the tree before a step, in a file that tar compares the tree with afterwards.
fn mark(site: &Site<'_>) -> Result<PathBuf, RecipeError> {
    let list = site.place("before-step");
    match fs::remove_file(&list) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(RecipeError::file(&list)(error));
        }
        _ => {}
    }
    // It reads no file for an archive that is thrown away.
    let tar = site.tar("--create", Path::new("/dev/null"), &site.tree()).arg(incremental(&list)).arg(".");
    tar.run(|_| {}).map_err(RecipeError::tool("looking at the root disk before a step"))?;
    let noted = fs::read(&list).map_err(RecipeError::file(&list))?;
    fs::write(&list, without_devices(&noted)).map_err(RecipeError::file(&list))?;
    Ok(list)
}

/// tar's list with every directory on no device, which `--no-check-device` passes over. tar would otherwise take a new
/// directory with the inode number of a removed one for that one renamed, and what it writes then cannot be unpacked.
///
/// The list is a line with tar's version, the seconds and nanoseconds of its beginning, and for each directory: 1 for NFS,
/// seconds, nanoseconds, device, inode, name, and what is in it, which an empty field ends. Each ends with a zero, each
/// directory with one more.
fn without_devices(list: &[u8]) -> Vec<u8> {
    let head = list.iter().position(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let (head, fields) = list.split_at(head);
    let mut fields: Vec<&[u8]> = fields.split(|byte| *byte == 0).collect();
    let mut at = 2;
    while at + 6 < fields.len() {
        fields[at + 3] = b"0";
        let contents = fields[at + 6..].iter().position(|field| field.is_empty());
        // Behind the contents' end and the directory's.
        at += 6 + contents.unwrap_or(fields.len()) + 2;
    }
    [head, &fields.join(&0)].concat()
}

fn incremental(list: &Path) -> std::ffi::OsString {
    let mut option = std::ffi::OsString::from("--listed-incremental=");
    option.push(list);
    option
}

/// Keeps the whole tree, or what has changed since `list` was made.
fn keep(site: &Site<'_>, archive: &Path, list: Option<&Path>, epoch: u64) -> Result<(), RecipeError> {
    let step = "keeping this step for the next build";
    site.say(step);
    let partial = site.place("partial.tar");
    let tar = site.tar("--create", &partial, &site.tree()).args(["--one-file-system", "--sort=name"]);
    let tar = match list {
        None => tar.args(["--clamp-mtime".to_owned(), format!("--mtime=@{epoch}")]),
        Some(list) => tar.arg("--no-check-device").arg(incremental(list)),
    };
    tar.arg(".").run(|_| {}).map_err(RecipeError::tool(step))?;
    finish(&partial, archive).map_err(RecipeError::file(archive))
}

/// Gives a complete file its name, once all of it is on disk.
pub(super) fn finish(partial: &Path, path: &Path) -> io::Result<()> {
    File::open(partial)?.sync_all()?;
    fs::rename(partial, path)?;
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::Interrupt;
    use crate::local::work_dir::WorkDir;
    use std::os::unix::fs::MetadataExt;

    fn number(path: &Path) -> u64 {
        fs::metadata(path).unwrap().ino()
    }

    /// Makes directories until each name has one with its number; false where the file system gives no number twice.
    fn with_numbers(tree: &Path, wanted: [(&str, u64); 2]) -> bool {
        let made: Vec<PathBuf> = (0..100).map(|at| tree.join(format!("made{at}"))).collect();
        made.iter().for_each(|path| fs::create_dir(path).unwrap());
        for path in &made {
            match wanted.iter().find(|(_, wanted)| *wanted == number(path)) {
                Some((name, _)) => fs::rename(path, tree.join(name)).unwrap(),
                None => fs::remove_dir(path).unwrap(),
            }
        }
        wanted.iter().all(|(name, _)| tree.join(name).is_dir())
    }

    #[test]
    fn a_directory_with_a_used_number_is_no_renamed_one() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (work, interrupt) = (WorkDir::create(dir.path(), "work").unwrap(), Interrupt::default());
        let site = Site::new(&work, &interrupt, &|_| {});
        let tree = site.tree();
        let fill = || {
            fs::create_dir_all(tree.join("old/deep")).unwrap();
            fs::create_dir_all(tree.join("stays")).unwrap();
            fs::write(tree.join("stays/file"), "stays").unwrap();
        };
        fill();
        let list = mark(&site).unwrap();
        let wanted = [("a", number(&tree.join("old"))), ("b", number(&tree.join("old/deep")))];
        fs::remove_dir_all(tree.join("old")).unwrap();
        if !with_numbers(&tree, wanted) {
            return;
        }
        fs::write(tree.join("b/new"), "new").unwrap();
        let archive = dir.path().join("layer.tar");
        keep(&site, &archive, Some(&list), 0).unwrap();
        fs::remove_dir_all(&tree).unwrap();
        fill();
        unpack(&site, &archive, false).unwrap();
        assert_eq!(fs::read_to_string(tree.join("b/new")).unwrap(), "new");
        assert_eq!(fs::read_to_string(tree.join("stays/file")).unwrap(), "stays");
        assert!(tree.join("a").is_dir() && !tree.join("old").exists());
    }
}
