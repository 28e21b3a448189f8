//! How commands fail: exit code, stdout and stderr, without `--json` and with it.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::golden::{Golden, Names};
use crate::program::{command, dated_snapshot, names, run, text, transcript};
use crate::support::{Hub, Lab, Mount, flip, legacy_pack};

/// A laboratory in which commands fail.
struct Failures {
    lab: Lab,
    names: Names,
    golden: Golden,
}

impl Failures {
    /// Runs a command that fails, twice.
    fn fail(&mut self, name: &str, args: &[&str]) {
        let with_json = [&["--json"], args].concat();
        let said = [args, &with_json].map(|args| transcript(args, &run(&self.lab, args)));
        self.keep(name, &said.join("\n"));
    }

    fn keep(&mut self, name: &str, said: &str) {
        assert!(!said.contains("exit code 0"), "{name} did not fail:\n{said}");
        self.golden.check(&format!("{name}.txt"), &without_attempts(&self.names.apply(said)));
    }

    fn write(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.lab.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        text(&path).to_owned()
    }
}

/// How often a hub that is away was asked, and for how long, is left to chance.
fn without_attempts(text: &str) -> String {
    let line = |line: &str| -> String {
        let parts = line
            .split_once(" after ")
            .and_then(|(before, rest)| Some((before, rest.split_once(" attempts in ")?)));
        match parts.and_then(|(before, (_, rest))| Some((before, rest.split_once(" s: ")?))) {
            Some((before, (_, rest))) => format!("{before} after <n> attempts in <n> s: {rest}"),
            None => line.to_owned(),
        }
    };
    text.split_inclusive('\n').map(line).collect()
}

#[test]
fn failures_are_what_they_were() {
    let lab = Lab::new();
    let (names, golden) = (names(&lab), Golden::open("errors"));
    let mut failures = Failures { lab, names, golden };
    usage(&mut failures);
    let pack = packs(&mut failures);
    snapshots(&mut failures, &pack);
    children(&mut failures);
    machines(&mut failures, &pack);
    hubs(&mut failures, &pack);
    changed_packs(&mut failures);
    mounts(&mut failures);
    directories(&mut failures);
    failures.golden.finish();
}

/// Command lines that make no sense.
fn usage(failures: &mut Failures) {
    for (name, args) in [
        ("usage-nothing", &[][..]),
        ("usage-unknown-verb", &["frok"]),
        ("usage-unknown-option", &["ps", "--al"]),
        ("usage-missing-argument", &["pull"]),
        ("usage-no-target", &["fork"]),
        ("usage-two-targets", &["fork", "o/n", "--tag", "t"]),
        ("usage-eval-and-exec", &["fork", "o/n", "--eval", "1", "--exec", "--", "ls"]),
        ("usage-count", &["fork", "o/n", "-n", "0"]),
        ("usage-variable", &["fork", "o/n", "--env", "A"]),
        ("usage-network", &["fork", "o/n", "--net", "everything"]),
        ("usage-cpus", &["fork", "o/n", "--cpus", "none"]),
        ("usage-publish", &["fork", "o/n", "--publish", "53/udp"]),
        ("usage-timeout", &["fork", "o/n", "--timeout", "5"]),
        ("usage-on-timeout", &["fork", "o/n", "--on-timeout", "pause"]),
        ("usage-forward", &["forward", "a1b2c3-1", "80:none"]),
        ("usage-forward-no-port", &["forward", "a1b2c3-1", "a1b2c3-2"]),
        ("usage-size", &["cache", "gc", "--cache-size", "much"]),
        ("usage-duration", &["mount", "x", "--deadline", "soon"]),
        ("usage-rate", &["hub", "serve", "x", "--bandwidth", "fast"]),
        ("usage-address", &["hub", "serve", "x", "--listen", "here"]),
        ("usage-level", &["pack", "--tag", "t", "--out", "x", "--level", "23"]),
        ("usage-shell", &["completions", "none"]),
        ("usage-nested", &["hub"]),
    ] {
        failures.fail(name, args);
    }
}

/// Files that are no packs, or in the way.
fn packs(failures: &mut Failures) -> String {
    dated_snapshot(&failures.lab, "demo");
    let pack = text(&failures.lab.pack("demo")).to_owned();
    let whole = fs::read(&pack).unwrap();
    let noise = failures.write("noise.tar.zst", b"hello, this is no pack at all, not even a little");
    let cut = failures.write("cut.tar.zst", &whole[..whole.len() / 2]);
    let old = text(&legacy_pack(&failures.lab, &[7; 10_000])).to_owned();
    let out = text(&failures.lab.path("out.tar.zst")).to_owned();
    failures.fail("not-a-pack", &["inspect", &noise]);
    failures.fail("not-a-pack-unpacked", &["unpack", &noise]);
    failures.fail("not-a-pack-published", &["hub", "publish", &noise, "--hub", "hub", "--name", "a/b"]);
    failures.fail("pack-cut-short", &["inspect", &cut]);
    failures.fail("pack-cut-short-unpacked", &["unpack", &cut, "--tag", "x"]);
    failures.fail("pack-cut-short-repacked", &["repack", &cut, "--out", &out]);
    failures.fail("pack-missing", &["inspect", "/nonexistent.tar.zst"]);
    failures.fail("pack-missing-forked", &["fork", "/nonexistent.tar.zst"]);
    failures.fail("pack-missing-warmed", &["warm", "/nonexistent.tar.zst"]);
    failures.fail("old-pack-forked", &["fork", &old]);
    failures.fail("old-pack-drawn", &["inspect", &old, "--heatmap", "x.svg"]);
    failures.fail("picture-without-place", &["inspect", &pack, "--heatmap", "/nonexistent/x.svg"]);
    failures.fail("pack-in-the-way", &["pack", "--tag", "demo", "--out", &pack]);
    failures.fail("pack-without-place", &["pack", "--tag", "demo", "--out", "/nonexistent/x"]);
    failures.fail("pack-chunk-size", &["pack", "--tag", "demo", "--out", &out, "--chunk", "100KiB"]);
    failures.fail("repack-in-the-way", &["repack", &pack, "--out", &pack]);
    failures.fail("repack-onto-directory", &["repack", &pack, "--out", "."]);
    failures.fail("repack-without-place", &["repack", &pack, "--out", "/nonexistent/x"]);
    deltas(failures, &pack);
    pack
}

/// Deltas, and what they lack.
fn deltas(failures: &mut Failures, pack: &str) {
    let base = failures.write("bases/base.tar.zst", &fs::read(pack).unwrap());
    let delta = text(&failures.lab.path("bases/delta.tar.zst")).to_owned();
    let args = ["pack", "--tag", "demo", "--delta", "--out", &delta];
    failures.fail("delta-without-base", &args);
    let dir = text(&failures.lab.snapshot_dir("demo")).to_owned();
    failures.fail("delta-of-snapshot", &[&args[..], &["--base", &dir]].concat());
    failures.fail("delta-chunk-size", &[&args[..], &["--base", &base, "--chunk", "1MiB"]].concat());
    run(&failures.lab, &[&args[..], &["--base", &base]].concat()).ok();
    failures.write("bases/base.tar.zst", b"something else");
    failures.fail("base-replaced", &["unpack", &delta, "--tag", "x"]);
    fs::remove_file(&base).unwrap();
    failures.fail("base-missing", &["unpack", &delta, "--tag", "x"]);
    failures.fail("base-missing-compared", &["diff", &delta]);
    failures.fail("diff-without-base", &["diff", "demo"]);
}

fn snapshots(failures: &mut Failures, pack: &str) {
    failures.fail("tag-unknown", &["pack", "--tag", "none", "--out", "x"]);
    failures.fail("tag-unknown-removed", &["rmi", "demo", "none"]);
    failures.fail("tag-unknown-forked", &["fork", "--tag", "none"]);
    failures.fail("tag-malformed", &["pack", "--tag", "a/b", "--out", "x"]);
    failures.fail("tag-in-the-way", &["unpack", pack]);
    failures.fail("snapshot-without-console", &["logs", "--tag", "demo"]);
    failures.fail("snapshot-without-probe", &["trace", "--tag", "demo"]);
    failures.fail("snapshot-malformed-forked", &["fork", "--tag", "demo"]);
    failures.fail("snapshot-malformed-traced", &["trace", "--tag", "demo", "--eval", "1"]);
}

fn children(failures: &mut Failures) {
    failures.fail("child-unknown-eval", &["eval", "abc-1", "1"]);
    failures.fail("child-unknown-exec", &["exec", "abc-1", "--", "ls"]);
    failures.fail("child-unknown-logs", &["logs", "abc-1"]);
    failures.fail("child-unknown-kill", &["kill", "abc-1"]);
    failures.fail("child-unknown-forward", &["forward", "abc-1", "80"]);
    failures.fail("child-unknown-branch", &["branch", "abc-1"]);
    failures.fail("child-unknown-snapshot", &["snapshot", "--child", "abc-1", "--tag", "t"]);
    failures.fail("child-unknown-pause", &["pause", "abc-1"]);
    failures.fail("fork-unknown-resume", &["resume", "abcdef"]);
    failures.fail("child-unknown-inspect", &["inspect", "--child", "abc-1"]);
    failures.fail("exec-environment", &["exec", "abc-1", "-e", "A", "--", "ls"]);
    failures.fail("warm-stop-unknown", &["warm", "--stop", "--tag", "demo"]);
}

/// What comes before a machine starts.
fn machines(failures: &mut Failures, pack: &str) {
    failures.fail("kernel-not-built", &["kernel", "path"]);
    failures.fail("recipe-missing", &["build", "/nonexistent"]);
    let recipe = failures.write("recipe/recipe.toml", b"name = 1\n");
    failures.fail("recipe-malformed", &["build", &recipe]);
    let more =
        failures.write("more/recipe.toml", b"name = \"x\"\nunknown = 1\n[base]\nsuite = \"bookworm\"\n");
    failures.fail("recipe-unknown-key", &["build", &more]);
    let valid = failures.write("valid/recipe.toml", b"name = \"x\"\n[base]\nsuite = \"bookworm\"\n");
    failures.fail("recipe-without-probe", &["trace", "--tag", "demo", "--recipe", &valid]);
    failures.fail("trace-without-probe", &["trace", pack, "--out", "x"]);
    failures.fail("trace-in-the-way", &["trace", pack, "--out", pack, "--eval", "1"]);
    failures.fail("kernel-source", &["kernel", "build", "--source", "."]);
    let snapshot = ["snapshot", "--tag", "x", "--kernel", "/nonexistent", "--rootfs", "/nonexistent"];
    failures.fail("snapshot-without-kernel", &snapshot);
}

/// Packages and hubs that are not there.
fn hubs(failures: &mut Failures, pack: &str) {
    let hub = text(&failures.lab.path("hub")).to_owned();
    let publish = ["hub", "publish", pack, "--hub", &hub, "--name"];
    run(&failures.lab, &[&publish[..], &["lab/demo"]].concat()).ok();
    failures.fail("publish-existing", &[&publish[..], &["lab/demo", "--version", "v1"]].concat());
    failures.fail("publish-latest", &[&publish[..], &["lab/demo", "--version", "latest"]].concat());
    failures.fail("publish-malformed-name", &[&publish[..], &["demo"]].concat());
    let release = ["--name", "lab/demo", "--github", "acme/packs"];
    let renamed = failures.lab.path("my pack");
    std::fs::copy(pack, &renamed).unwrap();
    failures.fail(
        "publish-asset-name",
        &[&["hub", "publish", text(&renamed), "--hub", &hub], &release[..]].concat(),
    );
    failures.fail("page-without-place", &["hub", "page", "--hub", &hub, "--out", "/nonexistent/page.html"]);
    failures.fail("reference-malformed", &["pull", "demo", "--hub", &hub]);
    failures.fail("package-nearly-known", &["pull", "lab/demmo", "--hub", &hub]);
    failures.fail("package-unknown", &["inspect", "other/thing", "--hub", &hub]);
    failures.fail("version-unknown", &["pull", "lab/demo@v7", "--tag", "x", "--hub", &hub]);
    failures.fail("pull-in-the-way", &["pull", "lab/demo", "--hub", &hub]);
    failures.fail("hub-not-named", &["pull", "lab/demo", "--tag", "x"]);
    failures.fail("hub-scheme", &["pull", "lab/demo", "--tag", "x", "--hub", "ftp://x/"]);
    failures.fail("hub-missing", &["images", "--hub", "/nonexistent"]);
    failures.fail("hub-away", &["images", "--hub", "http://127.0.0.1:1/"]);
    failures.fail("serve-missing", &["hub", "serve", "/nonexistent"]);
    for (name, registry) in [
        ("registry-malformed", &b"not a registry"[..]),
        ("registry-newer", b"{\"schema_version\": 99, \"packages\": {}}"),
        ("registry-entry", b"{\"schema_version\": 1, \"packages\": {\"a/b\": {\"versions\": {\"latest\": {\"url\": \"\"}}}}}"),
    ] {
        let place = failures.write(&format!("{name}/registry.json"), registry);
        failures.fail(name, &["inspect", "a/b", "--hub", &place]);
    }
    let server = Hub::start(&failures.lab, &[]);
    failures.names.name(&server.address, "address");
    failures.fail("serve-address-taken", &["hub", "serve", "--listen", &server.address, &hub]);
    let url = server.url();
    failures.fail("url-not-found", &["inspect", &format!("{url}none.tar.zst")]);
    failures.fail("hub-without-registry", &["images", "--hub", &format!("{url}none/")]);
}

/// Packs that are not what their registry says.
fn changed_packs(failures: &mut Failures) {
    let hub = failures.lab.path("hub");
    let pack = hub.join("lab-demo-v1.forkd-snapshot.tar.zst");
    let hub = text(&hub);
    let size = fs::metadata(&pack).unwrap().len();
    flip(&pack, size / 2);
    failures.fail("chunk-damaged", &["pull", "lab/demo", "--tag", "x", "--hub", hub]);
    let registry = Path::new(hub).join("registry.json");
    let published: Value = serde_json::from_slice(&fs::read(&registry).unwrap()).unwrap();
    let change = |change: &dyn Fn(&mut Value)| {
        let mut changed = published.clone();
        for version in changed["packages"]["lab/demo"]["versions"].as_object_mut().unwrap().values_mut() {
            change(version);
        }
        fs::write(&registry, changed.to_string()).unwrap();
    };
    change(&|version| version["index_sha256"] = "ab".repeat(32).into());
    failures.fail("index-digest", &["inspect", "lab/demo", "--hub", hub]);
    change(&|version| version.as_object_mut().unwrap().retain(|field, _| !field.starts_with("index_")));
    failures.fail("pack-digest", &["pull", "lab/demo", "--tag", "x", "--hub", hub]);
    fs::remove_file(&pack).unwrap();
    fs::write(&registry, published.to_string()).unwrap();
    failures.fail("pack-gone-from-hub", &["inspect", "lab/demo", "--hub", hub]);
}

fn mounts(failures: &mut Failures) {
    let hub = text(&failures.lab.path("hub")).to_owned();
    failures.fail("mountpoint-missing", &["mount", "/nonexistent", "--hub", &hub]);
    let file = failures.write("full/file", b"x");
    failures.fail("mountpoint-is-a-file", &["mount", &file, "--hub", &hub]);
    let full = text(&failures.lab.path("full")).to_owned();
    failures.fail("mountpoint-not-empty", &["mount", &full, "--hub", &hub]);
    fs::create_dir(failures.lab.path("work/empty")).unwrap();
    failures.fail("mount-hub-missing", &["mount", "empty", "--hub", "/nonexistent"]);
    failures.fail("umount-not-mounted", &["umount", &full]);
    let Failures { lab, names, golden } = failures;
    let mount = Mount::new(lab, "mnt", &hub, &[]);
    let open = fs::File::open(mount.dir.join("lab")).unwrap();
    let place = text(&mount.dir);
    for (name, args) in
        [("mountpoint-in-use", &["mount", place, "--hub", &hub][..]), ("umount-busy", &["umount", place])]
    {
        let said = transcript(args, &run(lab, args));
        assert!(!said.contains("exit code 0"), "{name} did not fail:\n{said}");
        golden.check(&format!("{name}.txt"), &names.apply(&said));
    }
    drop((open, mount));
}

/// Directories of forkd's own that cannot be used.
fn directories(failures: &mut Failures) {
    let nobody = |failures: &Failures, args: &[&str]| -> String {
        let mut homeless = command(&failures.lab, args);
        homeless.env_remove("HOME").env_remove("XDG_DATA_HOME");
        transcript(args, &homeless.output().unwrap().into())
    };
    let said = nobody(failures, &["snapshots"]) + "\n" + &nobody(failures, &["--json", "snapshots"]);
    failures.keep("no-home", &said);
    let pack = text(&failures.lab.path("work/demo.forkd-snapshot.tar.zst")).to_owned();
    let args = ["unpack", &pack];
    let mut blocked = command(&failures.lab, &args);
    blocked.env("XDG_DATA_HOME", "/dev/null");
    let said = transcript(&args, &blocked.output().unwrap().into());
    failures.keep("data-directory", &said);
}
