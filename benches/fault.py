#!/usr/bin/env python3
"""How long a guest waits for a page, by its own clock: a histogram of the faults of real forks.

    benches/fault.py FORKD [--runs 5] [--rtt 0] [--rate 0] [--drop-caches] [--csv FILE] [--svg FILE]

The guest (examples/synthetic_machine.rs, `timed`) reads one word of each page from 2 to 64 MiB and prints what every read
took, in ticks of its time stamp counter; there is no trace, so nothing is fetched before it is touched. The pack has chunks
of 256 KiB: the first page of each is a demand fault (`demand`), the other 63 are in the image by then and only have to be
mapped (`present`).

    http      a lazy fork, nothing cached: every chunk comes from the hub on loopback (--rtt in ms, --rate in MB/s)
    cached    the same with all chunks in the cache on disk and in the kernel's page cache
    disk      the same with the page cache dropped before; only with --drop-caches, which slows everybody on this machine
    eager     the whole pack downloaded first: all pages are in the image, and no userfaultfd watches
    local     a snapshot on this disk, no image at all: what a private mapping of a file costs here, the floor

The pages are noise: a chunk costs more to fetch and to hash than a machine's usual memory, and less to decode (`make
bench-criterion` has both apart). Percentiles are of one run's faults, as medians with their spread over the runs; the
histogram is of all runs' faults.

Needs: /dev/kvm, the example synthetic_machine (`make bench-fault` builds it); root with --drop-caches.
"""

from array import array

from common import drop_page_cache
from harness import Bench, device, main, root, synthetic_machines
from samples import percentile, print_table, ratio
from svg import histogram_svg, log_buckets

MEMORY_MIB, TOUCHED_MIB = 64, 64
PAGES_PER_CHUNK = 64
PAGES = (TOUCHED_MIB - 2) * 256
# The guest prints units of as many ticks.
TICKS = 16
TAG = "timed"
DEMAND, PRESENT = "demand", "present"


class Fault(Bench):
    names = ("way", "kind", "what")

    def options(self, parser):
        parser.add_argument("--rtt", type=int, default=0, help="ms")
        parser.add_argument("--rate", type=int, default=0, help="MB/s, 0 for no limit")
        parser.add_argument("--drop-caches", action="store_true", help="measure `disk` too; needs root")

    def needs(self):
        dropped = [root("--drop-caches drops the kernel's page cache")] if self.args.drop_caches else []
        return [device("/dev/kvm"), synthetic_machines(self.args.forkd), *dropped]

    def prepare(self):
        # Microseconds of every read, by way and kind.
        self.all = {}
        self.tsc_khz = self.place.synthetic(TAG, MEMORY_MIB, TOUCHED_MIB, 0, "timed")
        self.place.publish(TAG, "--chunk", f"{PAGES_PER_CHUNK * 4}KiB")

    def round(self, number):
        place, args = self.place, self.args
        self.fork("local", "--tag", TAG)
        with place.serve(args.rtt, args.rate) as url:
            what = (f"bench/{TAG}", "--hub", url)
            place.drop_cache()
            self.fork("http", *what)
            place.drop_cache()
            self.fork("eager", *what, "--eager")
            self.fork("cached", *what)
            if args.drop_caches:
                drop_page_cache()
                self.fork("disk", *what)

    def fork(self, way, *what):
        place = self.place
        report, printed = place.fork(*what, look=lambda report: place.console(report["children"][0]["id"]))
        assert not report["children"][0]["error"], report
        self.add_reads(way, printed)

    def add_reads(self, way, printed):
        ticks = array("I", printed)
        assert len(ticks) == PAGES, f"{len(ticks)} of {PAGES} reads were printed"
        took = [max(value, 1) * TICKS * 1e3 / self.tsc_khz for value in ticks]
        lazy = way in ("http", "cached", "disk")
        if lazy:
            self.add((way, DEMAND), took[::PAGES_PER_CHUNK])
        self.add((way, PRESENT), [value for page, value in enumerate(took) if page % PAGES_PER_CHUNK or not lazy])

    def add(self, key, values):
        self.all.setdefault(key, []).extend(values)
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1)):
            self.table.add((*key, name), "us", percentile(values, share))

    def samples(self):
        return {", ".join(key): values for key, values in self.all.items()}

    def show(self):
        floor = self.table.median(("local", PRESENT, "p50"), "us")
        rows = []
        for key, values in self.all.items():
            shown = [self.table.show((*key, name), "us") for name in ("p50", "p90", "p99", "max")]
            p50 = self.table.median((*key, "p50"), "us")
            rows.append([", ".join(key), len(values), *shown, ratio(p50, floor)])
        print_table(["microseconds", "faults", "p50", "p90", "p99", "max", "p50 to local"], rows)
        show_histogram({name: values for name, values in self.samples().items() if name.endswith(DEMAND)})

    def csv_table(self):
        """The histogram's buckets too."""
        for key, values in self.all.items():
            for bound, count in log_buckets(values).items():
                self.table.add((*key, f"up to {bound:.2f} us"), "faults", count)
        return self.table

    def draw(self, path):
        chosen = ["http, " + DEMAND, "cached, " + DEMAND, "cached, " + PRESENT, "eager, " + PRESENT, "local, " + PRESENT]
        title = "microseconds of a guest's read of a page, share of the reads by tenths of a decade"
        samples = self.samples()
        histogram_svg(path, title, {name: samples[name] for name in chosen})


def show_histogram(samples):
    for name, values in samples.items():
        print(f"\n{name}, microseconds")
        buckets = log_buckets(values, 5)
        most = max(buckets.values())
        for bound, count in buckets.items():
            print(f"  up to {bound:10.1f} {count:7} {'#' * round(60 * count / most)}")


if __name__ == "__main__":
    main(Fault(), __doc__)
