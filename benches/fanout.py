#!/usr/bin/env python3
"""Many children of one fork at once, beside the least that the host needs for as many machines.

    benches/fanout.py FORKD [--runs 5] [--counts 1,10,100,300] [--tag python-numpy | --synthetic] [--csv FILE] [--svg FILE]

The ways, one after the other in each run, each once the processors idle:

    floor     a process and a KVM machine each, without forkd (floor.c): the denominator
    local     children of a snapshot on this disk (`--tag`), its files in the page cache
    warm      the same with a resident image (`forkd warm`), if this forkd has that
    eager     children of its pack behind 20 ms and 50 MB/s, downloaded first (`--eager`); up to --eager-count of them

Per way and count: milliseconds from process start until the last child's first instruction (the wall clock of the fan-out)
and its ratio to the floor's; the median and 99th percentile over the children of first instruction, ready and answered;
children that failed or answered wrongly; and what a child adds to memory. Figures are medians over the runs with the
spread. PSS and private memory, which is what a child has written (Anonymous), are read from smaps_rollup while all children
live: the mean from forkd's report in every run, and every child's own of one detached fork a count (`PSS of each`).

A synthetic machine (--synthetic, 64 MiB, 4 of them read) has no answer, and its guests do not idle once they are ready.

Needs: /dev/kvm, cc, and the snapshot of --tag (`make machine`), or with --synthetic the example synthetic_machine (`make
bench-fanout` builds it).
"""

import contextlib

from common import TIMES, ForkFailed, Machine, note
from harness import Bench, device, main, numbers, settle, snapshot, synthetic_machines, tools
from samples import percentile, print_table, ratio
from svg import dots_svg

RTT_MS, RATE_MB = 20, 50
WAYS = ["floor", "local", "warm", "eager"]
WALL = "last first instruction"


def rollup(pid):
    """KiB by field of a process's smaps_rollup."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return {words[0]: int(words[1]) for words in map(str.split, file) if words[0].endswith(":")}


def memory_of_each(report):
    """PSS and private memory of every living child."""
    fields = []
    for child in report["children"]:
        # One that has failed since has no memory to be counted.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields.append(rollup(child["pid"]))
    return [field["Pss:"] for field in fields], [field["Anonymous:"] for field in fields]


def note_children(table, key, machine, count, report):
    children = report["children"] if report else []
    right = [child for child in children if machine.is_right(child)]
    table.add((*key, "failed"), "children", count - len(right))
    for what, field in TIMES.items():
        times = [child[field] for child in children if child[field] is not None]
        if times:
            table.add((*key, f"{what}, p50"), "ms", percentile(times, 0.5))
            table.add((*key, f"{what}, p99"), "ms", percentile(times, 0.99))
            if what == "first instruction":
                table.add((*key, WALL), "ms", max(times))
    if report and report["memory"]["pss_kib_per_child"] is not None:
        table.add((*key, "PSS, mean"), "KiB", report["memory"]["pss_kib_per_child"])
        table.add((*key, "private, mean"), "KiB", report["memory"]["private_kib_per_child"])


def fork(place, machine, count, *what, look=None):
    """A report, or none when forkd failed as a whole."""
    settle()
    try:
        return place.fork(*what, "-n", count, *machine.ask, look=look)
    except ForkFailed as failure:
        note(failure)
        return (None, None) if look else None


def floor_round(table, place, machine, count):
    settle()
    measured, key = place.floor(count, machine.memory_mib), (count, "floor")
    table.add((*key, WALL), "ms", measured["total_ms"])
    table.add((*key, "first instruction, p50"), "ms", percentile(measured["each_ms"], 0.5))
    table.add((*key, "first instruction, p99"), "ms", percentile(measured["each_ms"], 0.99))
    table.add((*key, "failed"), "children", measured["failed"])


def local_round(table, place, machine, count, way, first):
    what = ("--tag", machine.tag)
    note_children(table, (count, way), machine, count, fork(place, machine, count, *what))
    if first:
        _, seen = fork(place, machine, count, *what, "--detach", look=memory_of_each)
        for name, values in zip(("PSS of each", "private of each"), seen or ()):
            for value in values:
                table.add((count, way, name), "KiB", value)


def show(table, counts):
    headings = ["children, way", f"{WALL}, ms", "to floor", "p50", "p99", "ready p50", "p99", "answered p50", "p99", "failed"]
    rows, memory = [], []
    for count in counts:
        floor = table.median((count, "floor", WALL), "ms")
        for way in WAYS:
            key = (count, way)
            wall = table.median((*key, WALL), "ms")
            if wall is None:
                continue
            times = [table.median((*key, f"{what}, {share}"), "ms") for what in TIMES for share in ("p50", "p99")]
            shown = ["-" if time is None else f"{time:.1f}" for time in times]
            failed = sum(table.samples[((*key, "failed"), "children")])
            rows.append([f"{count} {way}", table.show((*key, WALL), "ms"), ratio(wall, floor), *shown, failed])
            names = ("PSS, mean", "private, mean", "PSS of each", "private of each")
            if way != "floor":
                memory.append([f"{count} {way}", *(table.show((*key, name), "KiB", 0) for name in names)])
    print_table(headings, rows)
    print()
    print_table(["children, way", "KiB a child: PSS, mean", "private, mean", "PSS of each", "private of each"], memory)


def draw(table, counts, path):
    rows = []
    for what in (WALL, "first instruction, p50", "first instruction, p99", "ready, p99", "answered, p99"):
        for count in counts:
            dots = {way: table.spread((count, way, what), "ms") for way in WAYS}
            rows.append((f"{what}, {count} children", {way: dot for way, dot in dots.items() if dot}))
    dots_svg(path, "milliseconds from process start, median and spread over the runs", rows)


class Fanout(Bench):
    names = ("children", "way", "what")
    settles = True

    def options(self, parser):
        parser.add_argument("--counts", type=numbers, default=[1, 10, 100, 300])
        parser.add_argument("--tag", default="python-numpy", help="a snapshot whose worker answers as python-numpy does")
        parser.add_argument("--synthetic", action="store_true", help="a machine of a few instructions instead")
        parser.add_argument("--eager-count", type=int, default=10, help="most children of an eager fork")

    def needs(self):
        args = self.args
        machine = synthetic_machines(args.forkd) if args.synthetic else snapshot(args.tag)
        return [device("/dev/kvm"), *tools(cc="build-essential"), machine]

    def prepare(self):
        if self.args.synthetic:
            self.machine = Machine.synthetic(self.place, "synthetic", 64, 4, 0)
        else:
            self.machine = Machine.of_user(self.place, self.args.tag)
        self.warm = self.place.can("warm")

    def round(self, number):
        for count in self.args.counts:
            note(f"  {count} children")
            self.count_round(count, number == 0)

    def count_round(self, count, first):
        table, place, machine = self.table, self.place, self.machine
        floor_round(table, place, machine, count)
        local_round(table, place, machine, count, "local", first)
        if self.warm:
            with place.warm("--tag", machine.tag):
                local_round(table, place, machine, count, "warm", first)
        if count <= self.args.eager_count:
            place.drop_cache()
            with place.serve(RTT_MS, RATE_MB) as url:
                what = (f"bench/{machine.tag}", "--hub", url, "--eager")
                note_children(table, (count, "eager"), machine, count, fork(place, machine, count, *what))

    def show(self):
        show(self.table, self.args.counts)

    def draw(self, path):
        draw(self.table, self.args.counts, path)


if __name__ == "__main__":
    main(Fanout(), __doc__)
