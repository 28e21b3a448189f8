#!/usr/bin/env python3
"""Reading a pack's memory.bin through `forkd mount`, beside `zstd -d`, `tar xO` and ratarmount, in one run.

    benches/mount.py FORKD [--pack FILE] [--runs 5] [--reads 400] [--csv FILE] [--svg FILE] [--no-ratarmount]

FORKD is a release build. Without --pack, 512 MiB that look like a machine's memory are made from this machine's own
files (half zero, a third code, the rest text and noise), packed and served by `forkd hub serve` on loopback. Every
figure is a median with its spread (smallest to largest) over the runs; the states of the caches are:

    cold         nothing cached anywhere: every chunk comes from the hub
    disk         chunks in forkd's cache on disk, the kernel's page cache dropped (`drop_caches`, needs root)
    chunks       chunks in forkd's cache and that in the kernel's page cache; the mount is fresh, so it decodes
    pages        read before through the same mount: the kernel's page cache answers

Random reads are 4 KiB at page-aligned offsets that hold data, the same offsets for all, each offset read once.
ratarmount (PyPI, in a venv of its own under the work directory unless --ratarmount names one) mounts the same pack
as a local file: over HTTP it fetches all of it first.

Needs: root, /dev/fuse, zstd, tar, fusermount3; the net for ratarmount, unless --ratarmount or --no-ratarmount is given.
"""

import mmap
import os
import random
import sys
import time
from pathlib import Path

from common import MIB, PAGE, drop_page_cache, run
from harness import Bench, device, main, root, tools
from samples import percentile, print_table, ratio
from svg import bars_svg

SIZE_MIB = 512


# ---- the synthetic machine ------------------------------------------------------------------------------------------


def library_bytes(directories, suffix, limit):
    """The contents of this machine's files with that in their names, in name order, up to `limit` bytes."""
    parts, total = [], 0
    for directory in directories:
        for path in sorted(Path(directory).rglob(f"*{suffix}*")):
            if total >= limit:
                return b"".join(parts)
            if path.is_file() and not path.is_symlink():
                parts.append(path.read_bytes())
                total += len(parts[-1])
    return b"".join(parts)


def synthetic_memory(path):
    """SIZE_MIB of memory: runs of 16 KiB to 2 MiB of zeros, code, text and noise, in a fixed random order."""
    rng = random.Random(20260101)
    code = library_bytes(["/usr/lib/x86_64-linux-gnu", "/usr/lib", "/usr/bin"], ".so", 220 * MIB)
    text = library_bytes(["/usr/share", "/usr/lib/python3"], ".py", 40 * MIB) or code
    taken = {id(code): 0, id(text): 0}

    def piece(source, length):
        at = taken[id(source)] % max(1, len(source) - length)
        taken[id(source)] += length
        return source[at : at + length]

    left = SIZE_MIB * MIB
    with open(path, "wb") as memory:
        while left:
            length = min(left, PAGE * rng.randint(4, 512))
            kind = rng.random()
            if kind < 0.50:
                memory.seek(length, os.SEEK_CUR)
            elif kind < 0.83:
                memory.write(piece(code, length))
            elif kind < 0.96:
                memory.write(piece(text, length))
            else:
                memory.write(rng.randbytes(length))
            left -= length
        memory.truncate(SIZE_MIB * MIB)


def synthetic_pack(place):
    snapshot = place.snapshots / "bench"
    snapshot.mkdir()
    synthetic_memory(snapshot / "memory.bin")
    (snapshot / "snapshot.json").write_text("{}\n")
    (snapshot / "vmstate").write_bytes(random.Random(1).randbytes(5000))
    (snapshot / "trace").write_bytes(b"")
    (snapshot / "rootfs.erofs").write_bytes(random.Random(2).randbytes(300_000))
    (snapshot / "manifest.toml").write_text(
        'forkd_pack_version = 3\ntag = "bench"\ncreated_at = "2026-01-02T03:04:05Z"\nforkd_version = "0.1.0"\n'
        f'[requires]\nmemory_mib = {SIZE_MIB}\nvcpus = 1\nkvm_kind = "pvm"\nkernel = "6.12"\nvmstate_version = 1\n'
    )
    pack = place.work / "bench.forkd-snapshot.tar.zst"
    place.run("pack", "--tag", "bench", "--out", pack)
    return pack


# ---- measuring ------------------------------------------------------------------------------------------------------


def sequential(path):
    """Seconds to read a file from start to end by 1 MiB, and the MiB read."""
    buffer = memoryview(mmap.mmap(-1, MIB))
    started, total = time.perf_counter(), 0
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            total += got
    return time.perf_counter() - started, total / MIB


def random_reads(path, offsets):
    """Milliseconds of each 4 KiB read."""
    times = []
    with open(path, "rb", buffering=0) as file:
        for offset in offsets:
            started = time.perf_counter()
            got = os.pread(file.fileno(), PAGE, offset)
            times.append((time.perf_counter() - started) * 1e3)
            assert len(got) == PAGE
    return times


def timed(*args):
    started = time.perf_counter()
    run(*args)
    return time.perf_counter() - started


class ForkdMount:
    def __init__(self, place, url):
        self.place, self.url, self.mountpoint = place, url, place.work / "mnt"
        self.file = self.mountpoint / "bench/bench/v1/memory.bin"

    def __enter__(self):
        self.mountpoint.mkdir(exist_ok=True)
        self.place.run("mount", "--hub", self.url, self.mountpoint)
        os.stat(self.file)
        return self

    def __exit__(self, *_):
        self.place.run("umount", self.mountpoint)


class RatarMount:
    def __init__(self, program, pack, work):
        self.mountpoint, self.program, self.pack, self.work = work / "ratarmount", program, pack, work
        self.mountpoint.mkdir(exist_ok=True)

    def __enter__(self):
        # Without an index file: every mount reads the archive, as a first mount does.
        run(self.program, "--index-file", ":memory:", self.pack, self.mountpoint)
        self.file = self.mountpoint / "memory.bin"
        os.stat(self.file)
        return self

    def __exit__(self, *_):
        run(self.program, "-u", self.mountpoint)


def add_random(table, name, times):
    for share in (50, 95, 99):
        table.add(f"random 4 KiB, {name}, p{share}", "ms", percentile(times, share / 100))


def forkd_round(table, place, url, offsets, size):
    """One run of everything on the forkd mount."""
    def sequence(name, file):
        seconds, mib = sequential(file)
        assert mib * MIB == size, f"{mib} MiB read of {size} bytes"
        table.add(f"sequential, forkd {name}", "MiB/s", mib / seconds)

    place.drop_cache()
    with ForkdMount(place, url) as mount:
        add_random(table, "forkd cold", random_reads(mount.file, offsets))
    place.drop_cache()
    drop_page_cache()
    with ForkdMount(place, url) as mount:
        sequence("cold", mount.file)
        sequence("pages", mount.file)
        add_random(table, "forkd pages", random_reads(mount.file, offsets))
    drop_page_cache()
    with ForkdMount(place, url) as mount:
        sequence("disk", mount.file)
    with ForkdMount(place, url) as mount:
        sequence("chunks", mount.file)
    with ForkdMount(place, url) as mount:
        add_random(table, "forkd chunks", random_reads(mount.file, offsets))
    drop_page_cache()
    with ForkdMount(place, url) as mount:
        add_random(table, "forkd disk", random_reads(mount.file, offsets))


def ratarmount_round(table, program, pack, work, offsets, size):
    started = time.perf_counter()
    with RatarMount(program, pack, work) as mount:
        table.add("mount, ratarmount", "s", time.perf_counter() - started)
        seconds, mib = sequential(mount.file)
        assert mib * MIB == size
        table.add("sequential, ratarmount first", "MiB/s", mib / seconds)
        seconds, mib = sequential(mount.file)
        table.add("sequential, ratarmount again", "MiB/s", mib / seconds)
    with RatarMount(program, pack, work) as mount:
        add_random(table, "ratarmount", random_reads(mount.file, offsets))


def tools_round(table, pack, alone, size):
    """`zstd -d` of memory.bin compressed alone at level 3 in one frame, and tar taking it out of the pack."""
    mib = size / MIB
    table.add("sequential, zstd -d", "MiB/s", mib / timed("sh", "-c", f"zstd -qdc '{alone}' >/dev/null"))
    table.add("sequential, zstd -d | cat", "MiB/s", mib / timed("sh", "-c", f"zstd -qdc '{alone}' | cat >/dev/null"))
    table.add(
        "sequential, tar xO", "MiB/s", mib / timed("sh", "-c", f"tar --zstd -xOf '{pack}' memory.bin | cat >/dev/null")
    )


def ratarmount_program(args, work):
    if args.no_ratarmount:
        return None
    if args.ratarmount:
        return args.ratarmount
    run(sys.executable, "-m", "venv", work / "venv")
    run(work / "venv/bin/pip", "install", "-q", "ratarmount")
    return work / "venv/bin/ratarmount"


def data_offsets(memory, count):
    """Page-aligned offsets that hold data, the same ones in every run."""
    rng, offsets = random.Random(7), []
    size = os.path.getsize(memory)
    with open(memory, "rb") as file:
        while len(offsets) < count:
            offset = rng.randrange(size // PAGE) * PAGE
            if offset not in offsets and any(os.pread(file.fileno(), PAGE, offset)):
                offsets.append(offset)
    return offsets


# ---- showing --------------------------------------------------------------------------------------------------------


def show(table):
    rows, base = [], table.median("sequential, zstd -d", "MiB/s")
    for row, unit, *spread, _ in table.rows():
        ratios = ["-", "-"]
        if unit == "MiB/s":
            median = table.median(row, unit)
            other = table.median("sequential, ratarmount first", unit)
            ratios = [ratio(median, base, 2), ratio(median, other, 2)]
        elif row.startswith("random"):
            other = table.median(f"random 4 KiB, ratarmount, {row.rsplit(' ', 1)[1]}", unit)
            ratios[1] = ratio(other, table.median(row, unit))
        digits = 0 if unit == "MiB/s" else 3
        rows.append([row, *(f"{value:.{digits}f}" for value in spread), unit, *ratios])
    print_table(["what", "median", "smallest", "largest", "unit", "speed to zstd -d", "to ratarmount's"], rows)


def draw(table, path):
    """The sequential rows as bars."""
    prefix = "sequential, "
    rows = [(row.removeprefix(prefix), *spread[:3]) for row, unit, *spread in table.rows() if unit == "MiB/s"]
    bars_svg(path, "sequential read of memory.bin, MiB/s", rows, lambda name: "forkd" in name)


class Mount(Bench):
    def options(self, parser):
        parser.add_argument("--pack", type=Path)
        parser.add_argument("--reads", type=int, default=400, help="random reads a run")
        parser.add_argument("--ratarmount", type=Path, help="an installed ratarmount")
        parser.add_argument("--no-ratarmount", action="store_true")

    def needs(self):
        packages = {"zstd": "zstd", "tar": "tar", "fusermount3": "fuse3"}
        return [root("it drops the kernel's page cache"), device("/dev/fuse"), *tools(**packages)]

    def prepare(self):
        place, work = self.place, self.place.work
        self.ratarmount = ratarmount_program(self.args, work)
        self.pack = self.args.pack.resolve() if self.args.pack else synthetic_pack(place)
        place.publish_pack(self.pack, "bench")
        memory, self.alone = work / "memory.bin", work / "memory.bin.zst"
        with open(memory, "wb") as out:
            run("tar", "--zstd", "-xOf", self.pack, "memory.bin", stdout=out)
        self.size = memory.stat().st_size
        run("zstd", "-q", "-3", "-T0", memory, "-o", self.alone)
        self.offsets = data_offsets(memory, self.args.reads)
        memory.unlink()
        pack, alone = (path.stat().st_size / MIB for path in (self.pack, self.alone))
        print(f"memory.bin {self.size / MIB:.0f} MiB; pack {pack:.1f} MiB; memory.bin alone at zstd 3 {alone:.1f} MiB")

    def round(self, number):
        place, offsets, size = self.place, self.offsets, self.size
        with place.serve() as url:
            tools_round(self.table, self.pack, self.alone, size)
            forkd_round(self.table, place, url, offsets, size)
            if self.ratarmount:
                ratarmount_round(self.table, self.ratarmount, self.pack, place.work, offsets, size)

    def show(self):
        show(self.table)

    def draw(self, path):
        draw(self.table, path)


if __name__ == "__main__":
    main(Mount(), __doc__)
