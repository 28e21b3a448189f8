#!/usr/bin/env python3
"""Branching a running child: how long it stands still, and how soon its branches run.

    benches/branch.py FORKD [--sizes 1,16,64,256] [--branches 50] [--counts 1,10,100] [--runs 1] [--csv F] [--svg F]

A child of python-numpy writes so many MiB, and is then branched again and again. Of each branching:

    host      from the moment that the machine rings until it is let go on, ms
    guest     the longest gap between two readings of its clock that a loop in the child saw, ms; beside it the same without
              branchings (kvm_pvm's guests are interrupted for milliseconds by themselves)
    first     from the command to the branch's first instruction, ms

Then as many branches at once, beside as many children of the same snapshot (`forkd fork --tag`), by their last first
instruction. Figures are medians (p50) and the 99th percentile over all branchings.

Needs: /dev/kvm, root, the snapshot python-numpy (`make machine`).
"""

import json
import subprocess
import time

from common import note
from harness import Bench, device, main, numbers, root, snapshot
from samples import percentile, print_table, ratio
from svg import dots_svg

TAG = "python-numpy"
# Keeps the longest gap between two readings of its clock, ns, where the worker finds it.
WATCH = """
import mmap, os, time
gap = memoryview(mmap.mmap(os.open('/run/gap', os.O_RDWR), 0)).cast('Q')
last = time.monotonic_ns()
while True:
    now = time.monotonic_ns()
    if now - last > gap[0]:
        gap[0] = now - last
    last = now
"""
FIND = "import mmap, os\ngap = memoryview(mmap.mmap(os.open('/run/gap', os.O_RDWR), 0)).cast('Q')"
TAKE = "taken, gap[0] = gap[0], 0\ntaken"
# Once every page has been written to.
FILL = "data = bytearray({0} << 20)\nfor at in range(0, len(data), 4096): data[at] = 1"


class Child:
    """A child that stays until the block ends."""

    def __init__(self, place, *options):
        self.place = place
        self.fork = place.run("--json", "fork", "--tag", TAG, "--detach", *options, stdout=subprocess.PIPE)
        self.id = json.loads(self.fork.stdout)["children"][0]["id"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.place.run("kill", self.id)

    def eval(self, code):
        said = self.place.run("--json", "eval", self.id, code, stdout=subprocess.PIPE)
        return json.loads(said.stdout)["answer"]

    def branch(self, count=1):
        said = self.place.run("--json", "branch", self.id, "-n", count, "--eval", "1", stdout=subprocess.PIPE)
        report = json.loads(said.stdout)
        assert all(child["answer"] == "1" for child in report["children"]), report
        return report

    def watch(self):
        """Starts the loop that watches the clock."""
        self.eval("import os\nos.truncate(os.open('/run/gap', os.O_RDWR | os.O_CREAT), 4096)")
        self.place.run("exec", "--detach", self.id, "--", "/usr/bin/python3", "-c", WATCH)
        self.eval(FIND)
        while not self.gap_ms():
            time.sleep(1)

    def gap_ms(self):
        """The longest gap since the last call."""
        return int(self.eval(TAKE)) / 1e6


class Branch(Bench):
    names = ("what", "how much")

    def options(self, parser):
        parser.set_defaults(runs=1)
        parser.add_argument("--sizes", type=numbers, default=[1, 16, 64, 256], help="MiB that the child has written")
        parser.add_argument("--branches", type=int, default=50, help="branchings of each size")
        parser.add_argument("--counts", type=numbers, default=[1, 10, 100], help="branches at once")

    def needs(self):
        return [device("/dev/kvm"), root("it looks at the memory of machines"), snapshot(TAG)]

    def prepare(self):
        self.place.link_snapshot(TAG)

    def round(self, number):
        for size in self.args.sizes:
            note(f"  {size} MiB")
            with Child(self.place) as child:
                child.eval(FILL.format(size))
                child.watch()
                self.branchings(child, size)
        for count in self.args.counts:
            note(f"  {count} at once")
            with Child(self.place) as child:
                report = child.branch(count)
                self.add("branches", count, max(one["first_instruction_ms"] for one in report["children"]))
            fork = self.place.fork("--tag", TAG, "-n", count, "--eval", "1")
            self.add("fork", count, max(one["first_instruction_ms"] for one in fork["children"]))
            self.add("floor", count, self.place.floor(count, 512)["total_ms"])

    def branchings(self, child, size):
        for _ in range(self.args.branches):
            child.gap_ms()
            time.sleep(0.2)
            self.add("guest without", size, child.gap_ms())
            report = child.branch()
            self.add("host", size, report["pause_ms"])
            self.add("guest", size, child.gap_ms())
            self.add("first", size, report["children"][0]["first_instruction_ms"])
            self.table.add(("copied", size), "MiB", report["copied_bytes"] / (1 << 20))
            self.table.add(("ranges", size), "ranges", report["ranges"])

    def add(self, what, how_much, ms):
        self.table.add((what, how_much), "ms", ms)

    def show(self):
        whats = ["host", "guest", "guest without", "first"]
        headings = ["written", *(f"{what}, p50 / p99 ms" for what in whats), "copied, MiB", "ranges"]
        rows = []
        for size in self.args.sizes:
            samples = [self.table.samples[((what, size), "ms")] for what in whats]
            cells = [f"{percentile(values, 0.5):.1f} / {percentile(values, 0.99):.1f}" for values in samples]
            copied, ranges = self.table.median(("copied", size), "MiB"), self.table.median(("ranges", size), "ranges")
            rows.append([f"{size} MiB", *cells, f"{copied:.1f}", f"{ranges:.0f}"])
        print_table(headings, rows)
        print()
        rows = []
        for count in self.args.counts:
            branches, fork, floor = (self.table.median((what, count), "ms") for what in ("branches", "fork", "floor"))
            times = [f"{ms:.1f}" for ms in (branches, fork, floor)]
            rows.append([f"{count} at once", *times, ratio(branches, fork), ratio(branches, floor)])
        print_table(["last first instruction", "branches, ms", "fork, ms", "floor, ms", "to fork", "to floor"], rows)

    def draw(self, path):
        spread = lambda what, size: self.table.spread((what, size), "ms")
        rows = [(f"{size} MiB", {what: spread(what, size) for what in ("host", "guest")}) for size in self.args.sizes]
        dots_svg(path, "ms that the child stands still, median and spread", rows)


if __name__ == "__main__":
    main(Branch(), __doc__)
