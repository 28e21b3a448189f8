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
"""

from common import Place, Table, arguments, dots_svg, note, numbers, print_table, ratio, write_csv

CODE = "numpy.zeros(5).tolist()"
ANSWER = "[0.0, 0.0, 0.0, 0.0, 0.0]"
TOUCHED_MIB = 64
REST_PERCENT = 12
TIMES = {"first instruction": "first_instruction_ms", "ready": "ready_ms", "answered": "answered_ms"}
NO_LINK = "-"
LOCAL = ["floor", "local", "warm"]


class Machine:
    """What is forked, and how it is asked."""

    def __init__(self, place, name):
        self.name = name
        if name == "python-numpy":
            self.there = place.link_snapshot(name)
            self.memory_mib, self.ask = 512, ["--eval", CODE]
        else:
            self.there, self.memory_mib, self.ask = True, int(name), []
            place.synthetic(name, self.memory_mib, TOUCHED_MIB, REST_PERCENT, "hot")
        if self.there:
            self.pack_mib = place.publish(name) / 2**20

    def fork(self, place, *what):
        report = place.fork(*what, *self.ask)
        (child,) = report["children"]
        assert not child["error"] and (not self.ask or child["answer"] == ANSWER), child
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
    key = (machine.name, NO_LINK, NO_LINK)
    table.add((*key, "floor", "first instruction"), "ms", place.floor(1, machine.memory_mib)["total_ms"])
    note_times(table, (*key, "local"), machine.fork(place, "--tag", machine.name))
    if warm:
        with place.warm("--tag", machine.name):
            note_times(table, (*key, "warm"), machine.fork(place, "--tag", machine.name))


def link_round(table, place, machine, rtt, rate):
    key = (machine.name, rtt, rate)
    with place.serve(rtt, rate) as url:
        what = [f"bench/{machine.name}", "--hub", url]
        place.drop_cache()
        note_times(table, (*key, "lazy"), machine.fork(place, *what))
        place.drop_cache()
        note_times(table, (*key, "eager"), machine.fork(place, *what, "--eager"))
        note_times(table, (*key, "cached"), machine.fork(place, *what))


def show(table, machines, links, ways):
    headings = ["machine, link, way", *(f"{what}, ms" for what in TIMES), "to eager", "to floor", "% fetched by first", "by answer"]
    rows = []
    for machine in machines:
        floor = table.median((machine.name, NO_LINK, NO_LINK, "floor", "first instruction"), "ms")
        for rtt, rate in [(NO_LINK, NO_LINK), *links]:
            eager = table.median((machine.name, rtt, rate, "eager", "first instruction"), "ms")
            for way in ways:
                key = (machine.name, rtt, rate, way)
                first = table.median((*key, "first instruction"), "ms")
                if first is None:
                    continue
                label = f"{machine.name}, {way}" if rtt == NO_LINK else f"{machine.name}, {rtt} ms {rate} MB/s, {way}"
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
            local = {way: table.spread((machine.name, NO_LINK, NO_LINK, way, what), "ms") for way in LOCAL}
            rows.append((f"{machine.name}: {what}", {way: dot for way, dot in local.items() if dot}))
            for rtt, rate in links:
                ways = ("lazy", "eager", "cached")
                dots = {way: table.spread((machine.name, rtt, rate, way, what), "ms") for way in ways}
                rows.append((f"{rtt} ms, {rate} MB/s", dots))
    dots_svg(path, "milliseconds from process start, median and spread", rows)


def main():
    parser = arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="20 ms and 50 MB/s; python-numpy and 512 MiB")
    parser.add_argument("--rtt", type=numbers, default=[0, 5, 20, 80], help="ms")
    parser.add_argument("--rate", type=numbers, default=[10, 50, 200], help="MB/s")
    parser.add_argument("--machines", default="python-numpy,64,512,2048", help="python-numpy, or MiB of synthetic ones")
    args = parser.parse_args()
    if args.quick:
        args.rtt, args.rate, args.machines = [20], [50], "python-numpy,512"
    links = [(rtt, rate) for rtt in args.rtt for rate in args.rate]
    with Place(args.forkd) as place:
        machines = [Machine(place, name) for name in args.machines.split(",")]
        for machine in machines:
            print(f"{machine.name}: " + (f"a pack of {machine.pack_mib:.1f} MiB" if machine.there else "no such snapshot"))
        machines = [machine for machine in machines if machine.there]
        table, warm = Table(), place.can("warm")
        for number in range(args.runs):
            for machine in machines:
                note(f"run {number + 1} of {args.runs}, {machine.name}")
                local_round(table, place, machine, warm)
                for rtt, rate in links:
                    link_round(table, place, machine, rtt, rate)
    show(table, machines, links, [*LOCAL, "lazy", "eager", "cached"])
    if args.csv:
        write_csv(table, args.csv, ("machine", "rtt_ms", "rate_mb", "way", "what"))
    if args.svg:
        draw(table, machines, links, args.svg)


if __name__ == "__main__":
    main()
