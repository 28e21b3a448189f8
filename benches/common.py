"""Where a bench works, and what it does there: snapshots, packs, the hub, forks, the machines that are forked.

A bench never touches the user's cache, run directory or snapshots: it has its own in a temporary folder, into which a
snapshot of the user's is linked, read only.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
PAGE = 4096
# What machines of the recipe python-numpy are asked, and what they answer.
CODE = "numpy.zeros(5).tolist()"
ANSWER = "[0.0, 0.0, 0.0, 0.0, 0.0]"
# The times of a child in forkd's report.
TIMES = {"first instruction": "first_instruction_ms", "ready": "ready_ms", "answered": "answered_ms"}


def run(*args, env=None, stdout=subprocess.DEVNULL):
    return subprocess.run([str(arg) for arg in args], check=True, env=env, stdout=stdout)


def note(text):
    print(text, file=sys.stderr, flush=True)


def drop_page_cache():
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def snapshot_of_user(tag):
    """The folder of one of the user's snapshots, if there is such."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    snapshot = data / "forkd/snapshots" / tag
    return snapshot if (snapshot / "manifest.toml").exists() else None


def synthetic_machine(forkd):
    """The program that makes synthetic machines, if it is built."""
    # Cargo's folder, which `make build` links forkd from.
    builds = (forkd.resolve().parent, forkd.resolve().parent.parent / "release")
    programs = (build / "examples/synthetic_machine" for build in builds)
    return next((program for program in programs if program.exists()), None)


class ForkFailed(Exception):
    """`forkd fork` has printed no report."""


class Place:
    """A temporary folder with forkd's directories, and what is done with forkd there."""

    def __init__(self, forkd):
        self.forkd = forkd.resolve()
        self._folder = tempfile.TemporaryDirectory(prefix="forkd-bench-")
        self.work = Path(self._folder.name)
        self.hub = self.work / "hub"
        self.env = dict(os.environ)
        self.env.pop("FORKD_HUB_URL", None)
        for variable, name in (("XDG_DATA_HOME", "data"), ("XDG_CACHE_HOME", "cache"), ("XDG_RUNTIME_DIR", "run")):
            (self.work / name).mkdir()
            self.env[variable] = str(self.work / name)
        self.snapshots = self.work / "data/forkd/snapshots"
        self.snapshots.mkdir(parents=True)
        self._floor = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._folder.cleanup()

    def run(self, *args, stdout=subprocess.DEVNULL):
        return run(self.forkd, *args, env=self.env, stdout=stdout)

    def can(self, verb):
        """Whether this forkd has a verb."""
        asked = subprocess.run([self.forkd, verb, "--help"], env=self.env, capture_output=True)
        return asked.returncode == 0

    def link_snapshot(self, tag):
        """Makes one of the user's snapshots usable here."""
        (self.snapshots / tag).symlink_to(snapshot_of_user(tag))

    def synthetic(self, tag, memory_mib, touched_mib, rest_percent, kind):
        """A snapshot of a machine of a few instructions (examples/synthetic_machine.rs); returns its TSC's kHz."""
        sizes = (memory_mib, touched_mib, rest_percent)
        made = run(synthetic_machine(self.forkd), self.snapshots / tag, *sizes, kind, stdout=subprocess.PIPE)
        return json.loads(made.stdout)["tsc_khz"]

    def publish(self, tag, *options):
        """Packs and publishes a snapshot as bench/TAG; returns the pack's bytes."""
        pack = self.work / f"{tag}.forkd-snapshot.tar.zst"
        self.run("pack", "--tag", tag, "--out", pack, *options)
        return self.publish_pack(pack, tag)

    def publish_pack(self, pack, name):
        self.run("hub", "publish", pack, "--hub", self.hub, "--name", f"bench/{name}")
        return pack.stat().st_size

    @contextlib.contextmanager
    def serve(self, rtt_ms=0, rate_mb=0):
        """The hub on loopback; yields its URL. A rate of 0 is no limit."""
        command = [self.forkd, "hub", "serve", self.hub, "--listen", "127.0.0.1:0", "--rtt", f"{rtt_ms}ms"]
        command += ["--bandwidth", f"{rate_mb}MB/s"] if rate_mb else []
        hub = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self.env)
        try:
            line = hub.stdout.readline()
            assert line.startswith("listening on "), line
            yield line.removeprefix("listening on ").strip()
        finally:
            hub.kill()
            hub.wait()

    def drop_cache(self):
        shutil.rmtree(self.work / "cache/forkd", ignore_errors=True)

    def console(self, child):
        """What a living child has printed."""
        return self.run("logs", child, stdout=subprocess.PIPE).stdout

    def fork(self, *args, look=None):
        """One `forkd fork`: its report, and what `look` makes of it while the children live (then they are killed)."""
        command = [str(arg) for arg in (self.forkd, "--json", "fork", *args)]
        log = self.work / "fork.log"
        with open(log, "w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=self.env)
        report = first_document(process.stdout)
        if report is None:
            process.wait()
            raise ForkFailed(f"{' '.join(command)}:\n{log.read_text()}")
        stays = "--detach" in command or not {"--eval", "--exec"} & set(command)
        try:
            seen = look(report) if look else None
        finally:
            living = [child["id"] for child in report["children"] if not child["error"]]
            if stays and living:
                # By name: others may have children of theirs on this machine.
                self.run("kill", *living)
            process.stdout.read()
            process.wait()
        return (report, seen) if look else report

    @contextlib.contextmanager
    def warm(self, *what):
        """A resident image (`forkd warm`) while the block runs; later forks of the same find it by themselves."""
        self.run("warm", *what)
        try:
            yield
        finally:
            self.run("warm", "--stop", "--all")

    def floor(self, count, memory_mib):
        """The least this host needs for as many machines (floor.c)."""
        if not self._floor:
            self._floor = self.work / "floor"
            run("cc", "-O2", "-o", self._floor, HERE / "floor.c")
        measured = json.loads(run(self._floor, count, memory_mib, stdout=subprocess.PIPE).stdout)
        assert measured["failed"] == 0, measured
        return measured


def first_document(stream):
    """The JSON document that a program prints, as soon as it is there: the program may go on. None if there is none."""
    text = ""
    for line in stream:
        text += line
        if line.startswith("}"):
            return json.loads(text)
    return None


class Machine:
    """What is forked, and how it is asked: a synthetic machine has no answer."""

    def __init__(self, place, tag, memory_mib, ask):
        self.tag, self.memory_mib, self.ask = tag, memory_mib, ask
        self.pack_mib = place.publish(tag) / MIB

    @classmethod
    def of_user(cls, place, tag):
        place.link_snapshot(tag)
        return cls(place, tag, 512, ["--eval", CODE])

    @classmethod
    def synthetic(cls, place, tag, memory_mib, touched_mib, rest_percent):
        place.synthetic(tag, memory_mib, touched_mib, rest_percent, "hot")
        return cls(place, tag, memory_mib, [])

    def is_right(self, child):
        return not child["error"] and (not self.ask or child["answer"] == ANSWER)
