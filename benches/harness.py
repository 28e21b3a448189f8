"""Runs a bench: its arguments, what it needs, the runs once the host is quiet, the table, CSV and SVG."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from common import Place, note, snapshot_of_user, synthetic_machine
from samples import Table, write_csv

RUNS = 5


class Bench:
    """What one bench is; each script fills in its own. `main` sets `args` and `place` before `prepare`."""

    # The headings of the parts of a row's name in the CSV.
    names = ("what",)
    # Whether `round` waits for a quiet host itself.
    settles = False

    def __init__(self):
        self.args, self.place, self.table = None, None, Table()

    def options(self, parser):
        """Adds the bench's own options."""

    def needs(self):
        """What must be there: pairs of whether it is, and what to do if not."""
        return []

    def prepare(self):
        """Makes the machines and packs, before the first run."""

    def round(self, number):
        """Measures everything once; adds to `table`."""
        raise NotImplementedError

    def show(self):
        """Prints the figures."""
        raise NotImplementedError

    def csv_table(self):
        return self.table

    def draw(self, path):
        """Writes the picture."""
        raise NotImplementedError


def main(bench, doc):
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forkd", type=Path, help="what `make build` leaves in target/static")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"at least {RUNS} for figures to be quoted")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--svg", type=Path)
    bench.options(parser)
    bench.args = args = parser.parse_args()
    check([program(args.forkd), *bench.needs()])
    with Place(args.forkd) as bench.place:
        bench.prepare()
        for number in range(args.runs):
            note(f"run {number + 1} of {args.runs}")
            if not bench.settles and not settle():
                note("the host is busy: read the ratios, not the figures")
            bench.round(number)
    bench.show()
    if args.csv:
        write_csv(bench.csv_table(), args.csv, bench.names)
    if args.svg:
        bench.draw(args.svg)


def numbers(text):
    """An option's value: numbers with commas."""
    return [int(part) for part in text.split(",")]


# ---- what benches need ----------------------------------------------------------------------------------------------


def check(needs):
    """Ends the program with all that is missing, if something is."""
    missing = [remedy for there, remedy in needs if not there]
    if missing:
        sys.exit("\n".join([f"{Path(sys.argv[0]).name} cannot run here:", *(f"  {remedy}" for remedy in missing)]))


def program(path):
    return os.access(path, os.X_OK) and path.is_file(), f"{path} is no program: `make build` leaves one in target/static"


def tools(**packages):
    """Programs by the Debian packages that have them."""
    return [(shutil.which(tool), f"{tool} is missing: install {package}") for tool, package in packages.items()]


def device(path):
    return os.access(path, os.R_OK | os.W_OK), f"{path} cannot be opened: `forkd doctor` says more"


def root(why):
    return os.geteuid() == 0, f"it must run as root: {why}"


def snapshot(tag):
    return snapshot_of_user(tag), f"there is no snapshot {tag}: `make machine` builds python-numpy"


def synthetic_machines(forkd):
    return synthetic_machine(forkd), "the example is not built: cargo build --release --example synthetic_machine"


# ---- a quiet host ---------------------------------------------------------------------------------------------------


def processor_times():
    """Jiffies that the processors have spent: (idle, all)."""
    with open("/proc/stat") as file:
        times = [int(time) for time in file.readline().split()[1:9]]
    return times[3] + times[4], sum(times)


def settle(limit_s=20):
    """Waits until the processors idle, and returns whether they did: the kernel takes machines and namespaces apart long
    after their processes are gone."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        before = processor_times()
        time.sleep(0.3)
        idle, total = (now - then for now, then in zip(processor_times(), before))
        if idle > 0.9 * total:
            return True
    return False
