#!/usr/bin/env python3
"""Every pack of a hub, forked lazily: what docs/PACKS.md says of them.

    benches/packs.py FORKD [--hub ./hub] [--packs NAMES] [--rtt 20] [--rate 50] [--runs 5] [--csv F] [--svg F]

A fork is asked the first probe of the pack's recipe, and has to give the answer that stands there. Times are forkd's own, in
milliseconds from the start of its process, as medians with their spread over the runs:

    lazy      nothing cached, from the hub behind the link (RTT in ms, bandwidth in MB/s, simulated by `forkd hub serve`)
    cached    the same command again

Private memory is what a child has written when it has answered. Then all packs are pulled into one cache, the one with the
most bytes first, and the table says what each adds to it: packs on one base share the chunks that are the same.

Needs: /dev/kvm; a hub's folder (`make hub`) with the recipes that its registry.json names below this repository.
"""

import json
import tomllib
from pathlib import Path

from common import HERE, MIB, TIMES, note
from harness import Bench, device, main
from samples import print_table
from svg import dots_svg

REPOSITORY = HERE.parent
TAG = "pulled"


class Pack:
    """One pack of the hub, and what a fork of it is asked."""

    def __init__(self, name, entry):
        self.name, self.title = name, name.split("/")[-1]
        self.memory_mib, self.size = entry["memory_mib"], entry["size_bytes"]
        recipe = tomllib.loads((REPOSITORY / entry["recipe_path"] / "recipe.toml").read_text())
        probe = next(probe for probe in recipe["probe"] if "eval" in probe)
        self.ask, self.expected = ["--eval", probe["eval"]], probe.get("expect")

    def check(self, child):
        assert not child["error"] and self.expected in (None, child["answer"]), (self.name, child)


def packs_of(hub):
    """The packs that a hub's folder has, by name."""
    packages = json.loads((hub / "registry.json").read_text())["packages"]
    latest = {name: package["versions"]["latest"] for name, package in packages.items()}
    return [Pack(name, entry) for name, entry in sorted(latest.items()) if entry.get("url")]


def bytes_below(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Packs(Bench):
    names = ("pack", "way", "what")

    def options(self, parser):
        parser.add_argument("--hub", type=Path, default=REPOSITORY / "hub")
        parser.add_argument("--packs", type=lambda text: text.split(","), help="names without their owner; all without it")
        parser.add_argument("--rtt", type=int, default=20, help="ms")
        parser.add_argument("--rate", type=int, default=50, help="MB/s")

    def needs(self):
        registry = self.args.hub / "registry.json"
        return [device("/dev/kvm"), (registry.is_file(), f"there is no {registry}: `make hub` makes it")]

    def prepare(self):
        self.place.hub = self.args.hub.resolve()
        self.packs = [pack for pack in packs_of(self.args.hub) if self.args.packs is None or pack.title in self.args.packs]

    def round(self, number):
        with self.place.serve(self.args.rtt, self.args.rate) as url:
            for pack in self.packs:
                note(f"  {pack.title}")
                self.place.drop_cache()
                for way in ("lazy", "cached"):
                    self.fork(pack, way, url)

    def fork(self, pack, way, url):
        report = self.place.fork(pack.name, "--hub", url, *pack.ask)
        (child,) = report["children"]
        pack.check(child)
        for what, field in TIMES.items():
            self.table.add((pack.title, way, what), "ms", child[field])
        self.table.add((pack.title, way, "private memory"), "MiB", report["memory"]["private_kib_per_child"] / 1024)
        for what in ("first_instruction", "answered"):
            fetched = report["fetched"][f"at_{what}"] / MIB
            self.table.add((pack.title, way, f"fetched, {what.replace('_', ' ')}"), "MiB", fetched)

    def show(self):
        headings = ["pack, way", "memory, MiB", "pack, MiB", *(f"{what}, ms" for what in TIMES)]
        headings += ["fetched by first, MiB", "by answer", "private, MiB"]
        rows = []
        for pack in self.packs:
            for way in ("lazy", "cached"):
                cell = lambda what, unit, digits=1: self.table.show((pack.title, way, what), unit, digits)
                times = [cell(what, "ms", 0) for what in TIMES]
                fetched = [cell(f"fetched, {what}", "MiB") for what in ("first instruction", "answered")]
                sizes = [pack.memory_mib, f"{pack.size / MIB:.1f}"]
                rows.append([f"{pack.title}, {way}", *sizes, *times, *fetched, cell("private memory", "MiB")])
        print_table(headings, rows)
        print()
        self.show_sharing()

    def show_sharing(self):
        """What the packs need together in one cache."""
        self.place.drop_cache()
        rows, before, chunks = [], 0, self.place.work / "cache/forkd/chunks"
        with self.place.serve() as url:
            for pack in sorted(self.packs, key=lambda pack: -pack.size):
                self.place.run("pull", pack.name, "--hub", url, "--tag", TAG, "--force")
                after = bytes_below(chunks)
                rows.append([pack.title, f"{pack.size / MIB:.1f}", f"{(after - before) / MIB:.1f}"])
                self.table.add((pack.title, "shared cache", "added"), "MiB", (after - before) / MIB)
                before = after
        self.place.run("rmi", TAG)
        together = sum(pack.size for pack in self.packs)
        rows.append(["all", f"{together / MIB:.1f}", f"{before / MIB:.1f}"])
        print_table(["pack", "alone, MiB", "adds to the cache, MiB"], rows)

    def draw(self, path):
        rows = []
        for what in TIMES:
            for pack in self.packs:
                spread = {way: self.table.spread((pack.title, way, what), "ms") for way in ("lazy", "cached")}
                rows.append((f"{pack.title}: {what}", {way: dot for way, dot in spread.items() if dot}))
        dots_svg(path, "milliseconds from process start, median and spread", rows)


if __name__ == "__main__":
    main(Packs(), __doc__)
