#!/usr/bin/env python3
"""Makes the starting corpora in fuzz/corpus/ from real packs: fuzz/make-corpus.py FORKD. They are checked in; run it again when
a format changes. FORKD must be built; trace and vmstate come from the local snapshot python-numpy when there is one."""

import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "corpus"
SNAPSHOTS = Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local/share")) / "forkd/snapshots"
CHUNK = 64 << 10


def save(target, name, data):
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def snapshot(folder, tag, memory, members):
    folder.mkdir(parents=True)
    manifest = (
        f'forkd_pack_version = 3\ntag = "{tag}"\ndescription = "a small one"\ncreated_at = "2026-01-02T03:04:05Z"\n'
        'forkd_version = "0.1.0"\n[requires]\nmemory_mib = 1\nvcpus = 1\nkvm_kind = "pvm"\nkernel = "6.12"\nvmstate_version = 1\n'
    )
    contents = {"manifest.toml": manifest.encode(), "snapshot.json": b"{}\n", "memory.bin": memory} | members
    for name, data in contents.items():
        (folder / name).write_bytes(data)


def index_of(pack):
    """The index frame: it ends where the seek table starts, and its last 16 bytes tell its length."""
    frames = struct.unpack("<I", pack[-9:-5])[0]
    end = len(pack) - (8 + frames * 8 + 9)
    return pack[end - struct.unpack("<I", pack[end - 16 : end - 12])[0] : end]


def packs(forkd, work):
    env = dict(os.environ, XDG_DATA_HOME=str(work / "data"), XDG_CACHE_HOME=str(work / "cache"), XDG_RUNTIME_DIR=str(work / "run"))
    real = SNAPSHOTS / "python-numpy"
    rng = random.Random(1)
    text = b"".join(b"line %d of a page of text\n" % n for n in range(9000))
    zeros = bytes(CHUNK)
    small = {"vmstate": b"state", "trace": b"", "rootfs.erofs": b"disk" * 500}
    kinds = {
        "holes": (zeros + text[:CHUNK] + zeros * 2 + text[: CHUNK // 2], small),
        "full": (text[: 3 * CHUNK], small),
        "empty": (b"", small),
        "odd": (rng.randbytes(700) + bytes(CHUNK), {"vmstate": b"", "trace": b"", "rootfs.erofs": b"x"}),
    }
    for name, (memory, members) in kinds.items():
        if real.is_dir() and name == "full":
            members = members | {member: (real / member).read_bytes() for member in ("trace", "vmstate")}
        snapshot(work / "data/forkd/snapshots" / name, name, memory, members)
        file = work / f"{name}.tar.zst"
        subprocess.run([forkd, "pack", "--tag", name, "--chunk", "64KiB", "--out", file], env=env, check=True, stdout=subprocess.DEVNULL)
        data = file.read_bytes()
        save("pack", name, data)
        save("index", name, index_of(data))
        manifest = subprocess.run(["tar", "--zstd", "-xOf", file, "manifest.toml"], check=True, stdout=subprocess.PIPE).stdout
        save("manifest", name, manifest)
        subprocess.run([forkd, "hub", "publish", file, "--hub", work / "hub", "--name", f"lab/{name}"], env=env, check=True, stdout=subprocess.DEVNULL)
        save("registry", f"{name}.json", (work / "hub/registry.json").read_bytes())
    # What the machine `full` has become.
    snapshot(work / "data/forkd/snapshots/delta", "delta", text[: 2 * CHUNK] + text[5 * CHUNK // 2 :][:CHUNK], small)
    file = work / "delta.tar.zst"
    against = ["--delta", "--base", work / "full.tar.zst"]
    subprocess.run([forkd, "pack", "--tag", "delta", *against, "--out", file], env=env, check=True, stdout=subprocess.DEVNULL)
    save("pack", "delta", file.read_bytes())
    save("index", "delta", index_of(file.read_bytes()))
    for member in ("trace", "vmstate"):
        if real.is_dir():
            save(member, "python-numpy", (real / member).read_bytes())
    save("trace", "none", b"FKTR\x01\0\0")
    save("trace", "small", b"FKTR\x01\0\x01\x0amemory.bin\x02\x02\x04\x01\x06\x03\x01\x10\x09")


def legacy(work):
    """The predecessor's two layouts, compressed and as bare tar (the target compresses what it gets)."""
    manifests = {
        1: 'forkd_pack_version = 1\ntag = "old"\n[rootfs]\ntarget_path = "/etc/cron.d/x"\nsha256 = "00"\nsize = 1\n',
        2: 'forkd_pack_version = 2\ntag = "old"\n[[chain]]\ntag = "base"\n[[chain]]\ntag = "old"\n',
    }
    for version, manifest in manifests.items():
        folder = work / f"v{version}"
        folder.mkdir()
        (folder / "manifest.toml").write_text(manifest)
        names = ["manifest.toml"]
        for link in ([""] if version == 1 else ["base/", "old/"]):
            (folder / link).mkdir(exist_ok=True)
            for name, data in (("snapshot.json", b"{}"), ("vmstate", b"firecracker"), ("memory.bin", b"m" * 3000)):
                (folder / link / name).write_bytes(data)
                names.append(link + name)
        tar = work / f"v{version}.tar"
        subprocess.run(["tar", "--format=ustar", "-cf", tar, "-C", folder, *names], check=True)
        save("legacy", f"v{version}.tar", tar.read_bytes())
        packed = subprocess.run(["zstd", "-qc", tar], check=True, stdout=subprocess.PIPE).stdout
        save("legacy", f"v{version}.tar.zst", packed)


def erofs(work):
    """Root disks of each layout mkfs.erofs knows, a compressed one (which is refused file by file) among them."""
    tree = work / "tree"
    (tree / "a/b").mkdir(parents=True)
    for number in range(6):
        (tree / "a" / f"file {number}").write_bytes(bytes([65 + number]) * number * 61)
    (tree / "blocks").write_bytes(b"two" * 1500)
    for number in range(90):
        (tree / "a/b" / f"{number:040}").touch()
    (tree / "link").symlink_to("a/b")
    os.link(tree / "blocks", tree / "a/b/again")
    os.mkfifo(tree / "pipe")
    for name, arguments in {
        "plain": [],
        "extended": ["-Eforce-inode-extended", "-Enoinline_data"],
        "chunks": ["--chunksize=4096", "-Eforce-chunk-indexes"],
        "lz4": ["-zlz4"],
    }.items():
        image = work / f"{name}.erofs"
        subprocess.run(["mkfs.erofs", "--quiet", "-T0", *arguments, image, tree], check=True, stdout=subprocess.DEVNULL)
        save("erofs", name, image.read_bytes())


def vector_states():
    """Eight numbers of a guest's registers, an instruction, and RAM: four tables that map every page to itself, and an area."""
    everything, write = (1 << 64) - 1, 3
    tables = b"".join(
        struct.pack("<512Q", *entries, *[0] * (512 - len(entries)))
        for entries in ([0x1000 | write], [0x2000 | write], [0x3000 | write], [page << 12 | write for page in range(16)])
    )
    image = bytearray(0x980)
    image[24:28] = struct.pack("<I", 0x1F80)
    image[512] = 0xE7
    for name, instruction, operand in (
        ("save", b"\x48\x0f\xae\x27", 0x5000),
        ("save-two-pages", b"\x48\x0f\xae\x27", 0x5D80),
        ("restore", b"\x48\x0f\xae\x2f", 0x5000),
        ("restore-two-pages", b"\x48\x0f\xae\xaf\0\0\0\0", 0x5D80),
        ("not-mapped", b"\x0f\xae\x67\x40", 0x10000),
    ):
        numbers = struct.pack("<8Q", everything, everything, operand, 1 << 16, 0, 1 << 18, 0xE7, 4096)
        memory = bytearray(0x7000)
        memory[: len(tables)] = tables
        if operand < len(memory):
            memory[operand : operand + len(image)] = image
        save("xsave", name, numbers + instruction.ljust(15, b"\x90") + memory[:0x7000])


with tempfile.TemporaryDirectory() as name:
    shutil.rmtree(CORPUS, ignore_errors=True)
    packs(Path(sys.argv[1]).resolve(), Path(name))
    legacy(Path(name))
    erofs(Path(name))
    vector_states()
