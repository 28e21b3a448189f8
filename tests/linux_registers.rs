//! Whether a real Linux guest computes right: registers of 256 and 512 bits hold what programs put into them, beside
//! other tasks, signals, tracers and forks, on one processor and several, and across a snapshot and a fork. Needs what
//! `linux.rs` needs. A few seconds each in the gate; `FORKD_SOAK=full` gives each a minute.

#[path = "linux/harness.rs"]
mod harness;

use harness::{Bed, Hub, soak};
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a guest's program says when the processor has no registers of this size.
const UNSUPPORTED: i32 = 77;
const AGENT: &str = "forkd-agent";
const TAG: &str = "registers";

/// Whether this processor has registers of the size that a check's last argument names.
fn host_has(check: &[&str]) -> bool {
    if check.last() == Some(&"512") {
        is_x86_feature_detected!("avx512f")
    } else {
        is_x86_feature_detected!("avx2")
    }
}

fn ran(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The program that checks registers, for guests.
fn program(dir: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/linux/guest/registers.c");
    let program = dir.join("registers");
    ran(Command::new("cc")
        .args(["-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&program)
        .arg(source));
    program
}

/// A fork of one child that goes on in the background.
struct Guest<'a> {
    bed: &'a Bed,
    hub: &'a Hub,
    child: String,
}

impl Guest<'_> {
    fn fork<'a>(bed: &'a Bed, hub: &'a Hub, tag: &str) -> Guest<'a> {
        let report = bed.json(hub, &["fork", "--tag", tag, "--detach"]);
        Guest { bed, hub, child: report["children"][0]["id"].as_str().unwrap().to_owned() }
    }

    fn put(&self, program: &Path) {
        let write = "cat > /tmp/registers && chmod +x /tmp/registers";
        let mut command = self.bed.command(self.hub);
        command.args(["exec", "-i", &self.child, "--", "sh", "-c", write]);
        ran(command.stdin(File::open(program).unwrap()));
    }

    /// Runs the program, which must find nothing wrong.
    fn check(&self, program: &str, arguments: &[&str]) {
        let all = [&["exec", &self.child, "--", program][..], arguments].concat();
        let (code, said) = self.bed.run(self.hub, &all).both();
        println!("{arguments:?}: {}", said.trim_end());
        if code == Some(UNSUPPORTED) {
            assert!(!host_has(arguments), "{arguments:?}: the guest lacks what the host has: {said}");
            return;
        }
        assert_eq!(code, Some(0), "{arguments:?}: {said}");
        assert!(said.contains(" bad=0"), "{arguments:?}: {said}");
    }

    /// Everything that happens to a program's registers.
    fn check_all(&self, program: &str) {
        let seconds = if soak() { "60" } else { "4" };
        for bits in ["256", "512"] {
            for processes in if soak() { &["2", "4"][..] } else { &["4"] } {
                self.check(program, &["hold", processes, seconds, bits]);
            }
            self.check(program, &["signal", seconds, bits]);
            self.check(program, &["spawn", if soak() { "30" } else { "2" }, bits]);
        }
        self.check(program, &["frames"]);
        self.check(program, &["ptrace"]);
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        let _ = self.bed.command(self.hub).args(["kill", &self.child]).output();
    }
}

#[test]
fn registers_survive_other_tasks_signals_tracers_and_new_processes() {
    let bed = Bed::new();
    let hub = Hub::at("http://127.0.0.1:9/".to_owned());
    let guest = Guest::fork(&bed, &hub, "python-numpy");
    guest.put(&program(&bed.path("")));
    guest.check_all("/tmp/registers");
}

/// A root disk with busybox, the agent and the program.
fn root_disk(dir: &Path, forkd: &Path) -> PathBuf {
    let root = dir.join("root");
    for name in ["bin", "dev", "etc", "forkd", "proc", "run", "sys", "tmp"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in ["sh", "cat", "nproc"] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::copy(forkd.with_file_name(AGENT), root.join("forkd/agent")).unwrap();
    fs::copy(program(dir), root.join("bin/registers")).unwrap();
    let image = dir.join("root.erofs");
    ran(Command::new("mkfs.erofs").arg("--quiet").args([&image, &root]).stdout(Stdio::null()));
    image
}

/// Snapshots a machine of so many vCPUs whose warm worker holds values in registers, forks it, and has copies check
/// theirs.
fn on_processors(vcpus: &str) {
    let bed = Bed::with_own_snapshots();
    let hub = Hub::at("http://127.0.0.1:9/".to_owned());
    let forkd = PathBuf::from(bed.command(&hub).get_program());
    let disk = root_disk(&bed.path(""), &forkd);
    let kernel = Bed::new().run(&hub, &["kernel", "path"]).success();
    let machine = ["--memory", "128", "--vcpus", vcpus, "--warm", "exec /bin/registers worker"];
    let files = ["snapshot", "--tag", TAG, "--rootfs", disk.to_str().unwrap(), "--kernel", kernel.trim()];
    bed.run(&hub, &[&files[..], &machine].concat()).success();
    for _ in 0..if soak() { 10 } else { 2 } {
        let report = bed.json(&hub, &["fork", "--tag", TAG, "-n", "2", "--eval", "check"]);
        for child in report["children"].as_array().unwrap() {
            assert_eq!(child["answer"], "held=3 bad=0", "{vcpus} vCPUs: {child}");
        }
    }
    let guest = Guest::fork(&bed, &hub, TAG);
    let processors = bed.run(&hub, &["exec", &guest.child, "--", "nproc"]).success();
    assert_eq!(processors.trim(), vcpus);
    guest.check_all("/bin/registers");
}

#[test]
fn registers_survive_on_two_processors_and_across_a_fork() {
    on_processors("2");
}

#[test]
fn registers_survive_on_four_processors_and_across_a_fork() {
    on_processors("4");
}
