//! What the tests of packs, hubs and mounts share: a laboratory directory with its own data, cache and run
//! directories, the real `forkd` program, real hub servers and real mounts.
#![allow(dead_code, reason = "each test file uses its own part")]

#[allow(clippy::duplicate_mod, reason = "the soak has both harnesses")]
#[path = "program.rs"]
mod program;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Bytes in one chunk of the packs made here.
pub const CHUNK: usize = 64 << 10;

/// A place where forkd runs without touching anything of the user's.
pub struct Lab {
    dir: TempDir,
}

/// What a run of forkd came to.
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "stderr: {}", self.stderr);
        self
    }

    /// Asserts an exit code and that stderr says each of `says`.
    pub fn fails(self, code: i32, says: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        for text in says {
            assert!(self.stderr.contains(text), "{text:?} is missing in: {}", self.stderr);
        }
        self
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}\n{}", self.stdout, self.stderr))
    }
}

impl From<Output> for Run {
    fn from(output: Output) -> Run {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Lab {
    pub fn new() -> Lab {
        let lab = Lab { dir: tempfile::tempdir().unwrap() };
        for name in ["data", "cache", "run", "work"] {
            fs::create_dir(lab.path(name)).unwrap();
        }
        lab
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(program::forkd());
        command
            .args(args)
            .current_dir(self.path("work"))
            .env("XDG_DATA_HOME", self.path("data"))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env_remove("FORKD_HUB_URL")
            .env_remove("FORKD_LOG")
            .stdin(Stdio::null());
        command
    }

    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Run {
        self.command(args).output().unwrap().into()
    }

    pub fn snapshot_dir(&self, tag: &str) -> PathBuf {
        self.path("data/forkd/snapshots").join(tag)
    }

    /// A synthetic snapshot: `mib` MiB of memory of which one quarter is data, and a small root disk.
    pub fn snapshot(&self, tag: &str, mib: usize) -> PathBuf {
        let dir = self.snapshot_dir(tag);
        fs::create_dir_all(&dir).unwrap();
        let manifest = format!(
            "forkd_pack_version = 3\ntag = \"{tag}\"\ncreated_at = \"2026-01-02T03:04:05Z\"\nforkd_version = \"0.1.0\"\n\
             [requires]\nmemory_mib = {mib}\nvcpus = 1\nkvm_kind = \"pvm\"\nkernel = \"6.12\"\nvmstate_version = 1\n"
        );
        fs::write(dir.join("manifest.toml"), manifest).unwrap();
        fs::write(dir.join("snapshot.json"), b"{}\n").unwrap();
        fs::write(dir.join("vmstate"), noise(tag.len() as u64, 5000)).unwrap();
        fs::write(dir.join("trace"), b"").unwrap();
        let memory = File::create(dir.join("memory.bin")).unwrap();
        memory.set_len((mib << 20) as u64).unwrap();
        let data = noise(7 + tag.len() as u64, mib << 18);
        memory.write_all_at(&data, (mib << 19) as u64).unwrap();
        fs::write(dir.join("rootfs.erofs"), root_disk(300_001)).unwrap();
        dir
    }

    /// Packs a snapshot of that tag, made first when there is none.
    pub fn pack(&self, tag: &str) -> PathBuf {
        if !self.snapshot_dir(tag).exists() {
            self.snapshot(tag, 16);
        }
        let out = self.path("work").join(format!("{tag}.forkd-snapshot.tar.zst"));
        self.run(&["pack", "--tag", tag, "--chunk", "64KiB", "--out", out.to_str().unwrap()]).ok();
        out
    }

    /// A hub folder with the pack of `tag` as `lab/TAG`.
    pub fn hub_dir(&self, tag: &str) -> PathBuf {
        let (pack, dir) = (self.pack(tag), self.path("hub"));
        self.publish(&pack, &format!("lab/{tag}")).ok();
        dir
    }

    pub fn publish(&self, pack: &Path, name: &str) -> Run {
        let hub = self.path("hub");
        self.run(&["hub", "publish", pack.to_str().unwrap(), "--hub", hub.to_str().unwrap(), "--name", name])
    }

    /// The published file of `lab/TAG`.
    pub fn published(&self, tag: &str) -> PathBuf {
        self.path("hub").join(format!("lab-{tag}-v1.forkd-snapshot.tar.zst"))
    }
}

/// An EROFS image with an empty root directory, and noise from its second chunk on.
pub fn root_disk(len: usize) -> Vec<u8> {
    const NID: u64 = 40;
    const AT: usize = 32 * NID as usize;
    let mut image = [vec![0; CHUNK], noise(9, len - CHUNK)].concat();
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    // Superblock: magic, blocks of 4 KiB, root directory.
    put(1024, &0xE0F5_E1E2u32.to_le_bytes());
    put(1036, &[12, 0, NID as u8]);
    // Compact inode with inline data: mode, links, size.
    put(AT, &[4, 0, 0, 0, 0xed, 0x41, 2, 0, 27]);
    // Its two entries: inode, where the name starts, that it is a directory.
    for (entry, name_at) in [(AT + 32, 24), (AT + 44, 25)] {
        put(entry, &NID.to_le_bytes());
        put(entry + 8, &[name_at, 0, 2]);
    }
    put(AT + 56, b"...");
    image
}

/// Incompressible bytes, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Changes one byte of a file in place.
pub fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], offset).unwrap();
}

/// A running `forkd hub serve`.
pub struct Hub {
    process: Child,
    pub address: String,
    log: PathBuf,
}

impl Hub {
    pub fn start(lab: &Lab, args: &[&str]) -> Hub {
        Hub::start_on(lab, "127.0.0.1:0", args)
    }

    /// Serves the lab's hub folder; returns when it listens.
    pub fn start_on(lab: &Lab, listen: &str, args: &[&str]) -> Hub {
        let (dir, log) = (lab.path("hub"), lab.path("access.log"));
        fs::create_dir_all(&dir).unwrap();
        let mut command = lab.command(&["hub", "serve", "--listen", listen, "--access-log"]);
        command.arg(&log).arg(&dir).args(args).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").expect("the hub listens").to_owned();
        Hub { process, address, log }
    }

    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    /// Lines of the access log: method, path, range, status, bytes.
    pub fn log(&self) -> Vec<String> {
        fs::read_to_string(&self.log).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    /// Body bytes of packs sent so far.
    pub fn pack_bytes(&self) -> u64 {
        let packs = self.log().into_iter().filter(|line| line.contains(".tar.zst"));
        packs.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    /// Ends it at once, connections and all; returns the address, to start another one there.
    pub fn kill(mut self) -> String {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.address.clone()
    }

    pub fn terminate(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.process.wait().unwrap().code()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A running `forkd mount`; lazily unmounted when dropped.
pub struct Mount<'a> {
    lab: &'a Lab,
    pub dir: PathBuf,
    pub pid: u32,
}

impl<'a> Mount<'a> {
    /// Mounts; the test fails with forkd's own words when that is impossible (no /dev/fuse, say).
    pub fn new(lab: &'a Lab, name: &str, hub: &str, args: &[&str]) -> Mount<'a> {
        let dir = lab.path(name);
        if let Err(error) = fs::create_dir(&dir) {
            // A dead mount's directory exists, though nothing can be said about it.
            assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists, "{}: {error}", dir.display());
        }
        let run = lab.command(&["--json", "mount", "--hub", hub]).args(args).arg(&dir).output().unwrap();
        let run = Run::from(run).ok();
        let pid = run.json()["pid"].as_u64().unwrap() as u32;
        Mount { lab, dir, pid }
    }

    pub fn version(&self, tag: &str) -> PathBuf {
        self.dir.join("lab").join(tag).join("v1")
    }

    pub fn stats(&self, tag: &str) -> Value {
        serde_json::from_slice(&fs::read(self.version(tag).join(".forkd/stats.json")).unwrap()).unwrap()
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = self.lab.run(&["umount", "--lazy", self.dir.to_str().unwrap()]);
        wait_until("the daemon has ended", || !is_running(self.pid));
    }
}

/// Whether a process exists and is not just waiting to be reaped.
pub fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
}

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(10), "not within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes of all files below a directory.
pub fn dir_bytes(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => dir_bytes(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

/// A pack in the predecessor's layout 1: one zstd frame of a tar.
pub fn legacy_pack(lab: &Lab, memory: &[u8]) -> PathBuf {
    let dir = lab.path("legacy");
    fs::create_dir_all(&dir).unwrap();
    let manifest = "forkd_pack_version = 1\ntag = \"old\"\ndescription = \"an old one\"\nforkd_version = \"0.5.3\"\n\
                    [rootfs]\ntarget_path = \"/etc/cron.d/evil\"\nsha256 = \"00\"\nsize = 1\n";
    fs::write(dir.join("manifest.toml"), manifest).unwrap();
    fs::write(dir.join("snapshot.json"), b"{}").unwrap();
    fs::write(dir.join("vmstate"), b"firecracker").unwrap();
    File::create(dir.join("memory.bin")).unwrap().write_all(memory).unwrap();
    let out = lab.path("old.forkd-snapshot.tar.zst");
    let members = ["manifest.toml", "snapshot.json", "vmstate", "memory.bin"];
    let status =
        Command::new("tar").arg("--zstd").arg("-cf").arg(&out).arg("-C").arg(&dir).args(members).status();
    assert!(status.unwrap().success());
    out
}
