#!/usr/bin/env python3
"""Time to the first instruction, to ready and to the answer of one fork, over a grid of links.

    benches/ttfi.py FORKD [--runs 5] [--quick] [--rtt 0,5,20,80] [--rate 10,50,200] [--machines NAMES] [--csv F] [--svg F]

Every figure is forkd's own, in milliseconds from the start of its process, as a median with its spread over the runs; the
ways are measured one after the other in each run:

    lazy      nothing cached, from a hub behind the link (RTT in ms, bandwidth in MB/s, simulated by `forkd hub serve`)
    eager     the whole pack downloaded first (`--eager`), nothing cached
    cached    the same command as lazy, with every chunk in the cache on disk
    local     a snapshot on this disk (`--tag`); no link matters
    warm      the same with a resident image (`forkd warm`), if this forkd has that
    floor     what the host needs for one such machine without forkd (floor.c)

Machines: `python-numpy`, the recipe's snapshot if it is there, which evaluates an expression; and synthetic ones of 64, 512
and 2048 MiB (examples/synthetic_machine.rs), whose guests read 64 MiB of noise before they are ready and answer nothing. An
eighth of their other memory is noise too, which eager fetches and lazy does not need. Their packs have hot pages as those
of `forkd build`, so the touched memory is in them twice. All of the grid takes about an hour, `--quick` some minutes.

Needs: /dev/kvm, cc, the example synthetic_machine (`make bench-ttfi` builds it); the snapshot python-numpy (`make machine`)
for the rows that are of it.
"""

from common import TIMES, Machine, note, snapshot_of_user
from harness import Bench, device, main, numbers, synthetic_machines, tools
from samples import print_table, ratio
from svg import dots_svg

RECIPE = "python-numpy"
TOUCHED_MIB = 64
REST_PERCENT = 12
NO_LINK = "-"
LOCAL = ["floor", "local", "warm"]


def fork(place, machine, *what):
    report = place.fork(*what, *machine.ask)
    (child,) = report["children"]
    assert machine.is_right(child), child
    return report


def note_times(table, key, report):
    for what, field in TIMES.items():
        table.add((*key, what), "ms", report["children"][0][field])
    total = report["pack"]["bytes_total"]
    for what in ("first_instruction", "answered"):
        fetched = report["fetched"][f"at_{what}"]
        if total and fetched is not None:
            table.add((*key, f"fetched, {what.replace('_', ' ')}"), "%", fetched / total * 100)


def local_round(table, place, machine, warm):
    key = (machine.tag, NO_LINK, NO_LINK)
    table.add((*key, "floor", "first instruction"), "ms", place.floor(1, machine.memory_mib)["total_ms"])
    note_times(table, (*key, "local"), fork(place, machine, "--tag", machine.tag))
    if warm:
        with place.warm("--tag", machine.tag):
            note_times(table, (*key, "warm"), fork(place, machine, "--tag", machine.tag))


def link_round(table, place, machine, rtt, rate):
    key = (machine.tag, rtt, rate)
    with place.serve(rtt, rate) as url:
        what = [f"bench/{machine.tag}", "--hub", url]
        place.drop_cache()
        note_times(table, (*key, "lazy"), fork(place, machine, *what))
        place.drop_cache()
        note_times(table, (*key, "eager"), fork(place, machine, *what, "--eager"))
        note_times(table, (*key, "cached"), fork(place, machine, *what))


def show(table, machines, links, ways):
    headings = ["machine, link, way", *(f"{what}, ms" for what in TIMES), "to eager", "to floor", "% fetched by first", "by answer"]
    rows = []
    for machine in machines:
        floor = table.median((machine.tag, NO_LINK, NO_LINK, "floor", "first instruction"), "ms")
        for rtt, rate in [(NO_LINK, NO_LINK), *links]:
            eager = table.median((machine.tag, rtt, rate, "eager", "first instruction"), "ms")
            for way in ways:
                key = (machine.tag, rtt, rate, way)
                first = table.median((*key, "first instruction"), "ms")
                if first is None:
                    continue
                label = f"{machine.tag}, {way}" if rtt == NO_LINK else f"{machine.tag}, {rtt} ms {rate} MB/s, {way}"
                times = [table.show((*key, what), "ms") for what in TIMES]
                fetched = [table.show((*key, f"fetched, {what}"), "%") for what in ("first instruction", "answered")]
                sooner = ratio(eager, first) if way in ("lazy", "cached") else "-"
                rows.append([label, *times, sooner, ratio(first, floor), *fetched])
    print_table(headings, rows)
    print("to eager: how many times sooner at the first instruction; to floor: how many times the floor; %: of the pack")


def draw(table, machines, links, path):
    rows = []
    for machine in machines:
        for what in ("first instruction", "answered"):
            local = {way: table.spread((machine.tag, NO_LINK, NO_LINK, way, what), "ms") for way in LOCAL}
            rows.append((f"{machine.tag}: {what}", {way: dot for way, dot in local.items() if dot}))
            for rtt, rate in links:
                ways = ("lazy", "eager", "cached")
                dots = {way: table.spread((machine.tag, rtt, rate, way, what), "ms") for way in ways}
                rows.append((f"{rtt} ms, {rate} MB/s", dots))
    dots_svg(path, "milliseconds from process start, median and spread", rows)


class Ttfi(Bench):
    names = ("machine", "rtt_ms", "rate_mb", "way", "what")

    def options(self, parser):
        parser.add_argument("--quick", action="store_true", help="20 ms and 50 MB/s; python-numpy and 512 MiB")
        parser.add_argument("--rtt", type=numbers, default=[0, 5, 20, 80], help="ms")
        parser.add_argument("--rate", type=numbers, default=[10, 50, 200], help="MB/s")
        parser.add_argument("--machines", default="python-numpy,64,512,2048", help="python-numpy, or MiB of synthetic ones")

    def needs(self):
        if self.args.quick:
            self.args.rtt, self.args.rate, self.args.machines = [20], [50], f"{RECIPE},512"
        self.links = [(rtt, rate) for rtt in self.args.rtt for rate in self.args.rate]
        self.tags = self.args.machines.split(",")
        synthetic = [synthetic_machines(self.args.forkd)] if set(self.tags) - {RECIPE} else []
        return [device("/dev/kvm"), *tools(cc="build-essential"), *synthetic]

    def prepare(self):
        self.machines, self.warm = [], self.place.can("warm")
        for tag in self.tags:
            if tag != RECIPE:
                machine = Machine.synthetic(self.place, tag, int(tag), TOUCHED_MIB, REST_PERCENT)
            elif snapshot_of_user(tag):
                machine = Machine.of_user(self.place, tag)
            else:
                print(f"{tag}: no such snapshot")
                continue
            print(f"{tag}: a pack of {machine.pack_mib:.1f} MiB")
            self.machines.append(machine)

    def round(self, number):
        for machine in self.machines:
            note(f"  {machine.tag}")
            local_round(self.table, self.place, machine, self.warm)
            for rtt, rate in self.links:
                link_round(self.table, self.place, machine, rtt, rate)

    def show(self):
        show(self.table, self.machines, self.links, [*LOCAL, "lazy", "eager", "cached"])

    def draw(self, path):
        draw(self.table, self.machines, self.links, path)


if __name__ == "__main__":
    main(Ttfi(), __doc__)
