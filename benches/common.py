"""What the bench scripts share: a place of their own, forkd, its hub and its forks, samples, tables, CSV and SVG.

A bench never touches the user's cache, run directory or snapshots: it has its own in a temporary folder, into which a
snapshot of the user's is linked, read only.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
PAGE = 4096
RUNS = 5
COLOURS = ["#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#718096", "#b7791f"]


def run(*args, env=None, stdout=subprocess.DEVNULL):
    return subprocess.run([str(arg) for arg in args], check=True, env=env, stdout=stdout)


def note(text):
    print(text, file=sys.stderr, flush=True)


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))]


def numbers(text):
    return [int(part) for part in text.split(",")]


def arguments(doc):
    """The options that all benches have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forkd", type=Path, help="what `make build` leaves in target/static")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"at least {RUNS} for figures to be quoted")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--svg", type=Path)
    return parser


class ForkFailed(Exception):
    """`forkd fork` has printed no report."""


def processor_times():
    """Jiffies that the processors have spent: (idle, all)."""
    with open("/proc/stat") as file:
        times = [int(time) for time in file.readline().split()[1:9]]
    return times[3] + times[4], sum(times)


def settle(limit_s=20):
    """Waits until the processors idle: the kernel takes machines and namespaces apart long after their processes are gone."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        before = processor_times()
        time.sleep(0.3)
        idle, total = (now - then for now, then in zip(processor_times(), before))
        if idle > 0.9 * total:
            return


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
        """Makes one of the user's snapshots usable here; returns whether there is one."""
        data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
        theirs = data / "forkd/snapshots" / tag
        if not (theirs / "manifest.toml").exists():
            return False
        (self.snapshots / tag).symlink_to(theirs)
        return True

    def synthetic(self, tag, memory_mib, touched_mib, rest_percent, kind):
        """A snapshot of a machine of a few instructions (examples/synthetic_machine.rs); returns its TSC's kHz."""
        # Cargo's, which `make build` links forkd from.
        builds = (self.forkd.parent, self.forkd.parent.parent / "release")
        programs = [build / "examples/synthetic_machine" for build in builds]
        program = next((program for program in programs if program.exists()), None)
        if program is None:
            sys.exit(f"{programs[-1]} is missing: cargo build --release --example synthetic_machine")
        sizes = (memory_mib, touched_mib, rest_percent)
        made = run(program, self.snapshots / tag, *sizes, kind, stdout=subprocess.PIPE)
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


# ---- samples --------------------------------------------------------------------------------------------------------


class Table:
    """Samples by row: what was measured (a name, or a tuple of names), in which unit."""

    def __init__(self):
        self.samples = {}

    def add(self, row, unit, value):
        self.samples.setdefault((row, unit), []).append(value)

    def median(self, row, unit):
        values = self.samples.get((row, unit))
        return statistics.median(values) if values else None

    def spread(self, row, unit):
        """Median, smallest, largest."""
        values = self.samples.get((row, unit))
        return (statistics.median(values), min(values), max(values)) if values else None

    def show(self, row, unit, digits=1):
        spread = self.spread(row, unit)
        if not spread:
            return "-"
        median, low, high = (f"{value:.{digits}f}" for value in spread)
        return f"{median} ({low}-{high})"

    def rows(self):
        for (row, unit), values in self.samples.items():
            yield row, unit, statistics.median(values), min(values), max(values), len(values)


def ratio(value, base):
    return f"{value / base:.1f}x" if value is not None and base else "-"


def print_table(headings, rows):
    """The first column to the left, the others to the right."""
    rows = [headings, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(headings))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        print("  ".join(cells).rstrip())


def write_csv(table, path, names=("what",)):
    """One line a row; `names` are the headings of a row's parts."""
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow([*names, "unit", "median", "smallest", "largest", "runs"])
        for row, unit, median, low, high, runs in table.rows():
            parts = [row] if isinstance(row, str) else row
            out.writerow([*parts, unit, f"{median:.4f}", f"{low:.4f}", f"{high:.4f}", runs])


# ---- SVG ------------------------------------------------------------------------------------------------------------


def text(x, y, content, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


def line(x1, y1, x2, y2, colour="#000", width=1):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def write_svg(path, width, height, parts):
    Path(path).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def bars_svg(path, title, bars, is_ours):
    """Bars of (name, median, low, high), their spread as a line."""
    scale = 420 / max(high for *_, high in bars)
    parts = [text(212, 12, title)]
    for number, (name, median, low, high) in enumerate(bars):
        y = 30 * number + 20
        colour = COLOURS[0] if is_ours(name) else "#a0aec0"
        parts += [
            text(205, y + 14, name, "end"),
            f'<rect x="212" y="{y}" width="{median * scale:.1f}" height="20" fill="{colour}"/>',
            line(212 + low * scale, y + 10, 212 + high * scale, y + 10),
            text(220 + high * scale, y + 14, f"{median:.0f}"),
        ]
    write_svg(path, 720, 30 * len(bars) + 30, parts)


class LogScale:
    """Positions on a logarithmic axis of whole decades."""

    def __init__(self, values, left, width):
        self.low = math.floor(math.log10(min(values)))
        self.high = max(self.low + 1, math.ceil(math.log10(max(values))))
        self.left, self.width = left, width

    def at(self, value):
        return self.left + (math.log10(value) - self.low) / (self.high - self.low) * self.width

    def grid(self, top, bottom):
        for decade in range(self.low, self.high + 1):
            x = self.at(10.0**decade)
            yield line(x, top, x, bottom, "#e2e8f0")
            yield text(x, bottom + 14, f"{10.0**decade:g}", "middle")


def legend(series, left, width, y):
    for number, name in enumerate(series):
        x = left + width * number / len(series)
        yield f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{COLOURS[number % len(COLOURS)]}"/>{text(x + 8, y, name)}'


def dots_svg(path, title, rows):
    """Rows of (label, {series: (median, low, high)}): a dot a series with its spread, on one logarithmic axis."""
    series = list(dict.fromkeys(name for _, dots in rows for name in dots))
    left, top, step = 260, 44, 20
    scale = LogScale([value for _, dots in rows for dot in dots.values() for value in dot], left, 560)
    bottom = top + step * len(rows)
    parts = [text(left, 14, title), *legend(series, left, 560, 34), *scale.grid(top, bottom)]
    for number, (label, dots) in enumerate(rows):
        y = top + step * number + 12
        parts.append(text(left - 8, y + 4, label, "end"))
        for name, (median, low, high) in dots.items():
            colour = COLOURS[series.index(name) % len(COLOURS)]
            parts.append(line(scale.at(low), y, scale.at(high), y, colour, 2))
            parts.append(f'<circle cx="{scale.at(median):.1f}" cy="{y}" r="4" fill="{colour}"/>')
    write_svg(path, left + 600, bottom + 24, parts)


def log_buckets(values, per_decade=10):
    """How many values lie in each bucket of a logarithmic scale: {upper bound: count}, empty ones between them too."""
    numbers = [math.ceil(math.log10(value) * per_decade) for value in values]
    counts = {number: 0 for number in range(min(numbers), max(numbers) + 1)}
    for number in numbers:
        counts[number] += 1
    return {10 ** (number / per_decade): count for number, count in counts.items()}


def histogram_svg(path, title, samples):
    """Which share of the samples of each series lies in each bucket, as outlines on a logarithmic axis."""
    left, top, width, height = 60, 44, 700, 300
    buckets = {name: log_buckets(values) for name, values in samples.items()}
    shares = {name: {bound: count / len(samples[name]) for bound, count in buckets[name].items()} for name in buckets}
    scale = LogScale([value for values in samples.values() for value in values], left, width)
    most = max(share for series in shares.values() for share in series.values())
    parts = [text(left, 14, title), *legend(samples, left, width, 34), *scale.grid(top, top + height)]
    for part in range(5):
        y = top + height * (1 - part / 4)
        parts += [line(left, y, left + width, y, "#e2e8f0"), text(left - 6, y + 4, f"{most * part / 4:.0%}", "end")]
    for number, series in enumerate(shares.values()):
        points, bounds = [], list(series)
        for bound, share in series.items():
            y = top + height * (1 - share / most)
            points += [(scale.at(bound / 10**0.1), y), (scale.at(bound), y)]
        foot = top + height
        points = [(points[0][0], foot), *points, (scale.at(bounds[-1]), foot)]
        outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{outline}" fill="none" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2"/>')
    write_svg(path, left + width + 30, top + height + 24, parts)
