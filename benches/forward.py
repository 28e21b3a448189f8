#!/usr/bin/env python3
"""What `forkd forward` costs: round trips, throughput and many connections at once, beside ways without it.

    benches/forward.py FORKD [--tag python-numpy] [--runs 5] [--mib 16] [--csv FILE] [--svg FILE]

Servers run in threads of a copy's warm worker. The rows:

    inside    a client in the same guest, on its loopback: what the guest itself takes
    vsock     a client on the host that asks the agent through the child's vsock by itself: no forkd on the host's side
    forward   the same through `forkd forward`; its difference to `vsock` is the host's side of forkd
    resume    an answer right after a paused copy goes on, beside one of a copy that was not paused

Round trips are of one byte, as medians of a run's; throughput is of --mib each way; `at once` is from the first of 100
connections opened to the last one's answer, each of one byte. The figures are medians with their spread over the runs.

Needs: /dev/kvm, the snapshot that `make machine` builds.
"""

import contextlib
import json
import os
import signal
import socket
import statistics
import struct
import subprocess
import threading
import time

from common import MIB
from harness import Bench, device, main, snapshot
from samples import print_table, ratio
from svg import bars_svg

AGENT_PORT = 5252
ECHO, SINK, SOURCE = 7001, 7002, 7003
TRIPS, CONNECTIONS = 200, 100
BLOCK = 256 << 10
SERVERS = f"""
import socket, threading, time
def serve(port, work):
    server = socket.create_server(('127.0.0.1', port), backlog=256)
    def accept():
        while True:
            peer = server.accept()[0]
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=lambda: (work(peer), peer.close()), daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()
def echo(peer):
    while block := peer.recv(1 << 16): peer.sendall(block)
def sink(peer):
    count = 0
    while block := peer.recv({BLOCK}): count += len(block)
    peer.sendall(str(count).encode())
def source(peer):
    block = bytes({BLOCK})
    for _ in range(int(peer.recv(16))): peer.sendall(block)
def trips(count):
    peer = socket.create_connection(('127.0.0.1', {ECHO}))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    took = []
    for _ in range(count):
        began = time.monotonic()
        peer.sendall(b'x'); peer.recv(1)
        took.append(time.monotonic() - began)
    return took
def send(blocks):
    peer = socket.create_connection(('127.0.0.1', {SINK}))
    began = time.monotonic()
    for _ in range(blocks): peer.sendall(bytes({BLOCK}))
    peer.shutdown(socket.SHUT_WR); peer.recv(16)
    return time.monotonic() - began
def at_once(count):
    began = time.monotonic()
    peers = [socket.create_connection(('127.0.0.1', {ECHO})) for _ in range(count)]
    for peer in peers: peer.sendall(b'x')
    for peer in peers: peer.recv(1)
    return time.monotonic() - began
serve({ECHO}, echo); serve({SINK}, sink); serve({SOURCE}, source)
"""


class Forward(Bench):
    names = ("way", "what")

    def options(self, parser):
        parser.add_argument("--tag", default="python-numpy")
        parser.add_argument("--mib", type=int, default=16)

    def needs(self):
        return [device("/dev/kvm"), snapshot(self.args.tag)]

    def prepare(self):
        self.place.link_snapshot(self.args.tag)

    def round(self, number):
        self.place.fork("--tag", self.args.tag, "--detach", look=lambda report: self.measure(report["children"][0]))

    def measure(self, child):
        self.id = child["id"]
        self.eval(SERVERS)
        self.inside()
        path = self.place.work / "run/forkd/forks" / self.id.split("-")[0] / f"{self.id}.vsock"
        self.ways("vsock", lambda port: ask(path, port))
        with self.forward() as ports:
            self.ways("forward", lambda port: through(ports[port]))
        self.resume(child["pid"])

    def eval(self, code):
        printed = self.place.run("--json", "eval", self.id, code, stdout=subprocess.PIPE).stdout
        return json.loads(json.loads(printed)["answer"] or "null")

    def inside(self):
        self.add("inside", "round trip", "ms", statistics.median(self.eval(f"trips({TRIPS})")) * 1e3)
        blocks = self.args.mib * MIB // BLOCK
        self.add("inside", "to the guest", "MiB/s", self.args.mib / self.eval(f"send({blocks})"))
        self.add("inside", f"{CONNECTIONS} at once", "ms", self.eval(f"at_once({CONNECTIONS})") * 1e3)

    @contextlib.contextmanager
    def forward(self):
        command = [self.place.forkd, "forward", self.id, *(str(port) for port in (ECHO, SINK, SOURCE))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self.place.env)
        try:
            lines = [process.stdout.readline() for _ in (ECHO, SINK, SOURCE)]
            pairs = [(line.split()[0].rpartition(":")[2], line.rpartition(":")[2]) for line in lines]
            yield {int(guest): int(local) for local, guest in pairs}
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()

    def ways(self, way, connect):
        with connect(ECHO) as peer:
            took = [trip(peer) for _ in range(TRIPS)]
        self.add(way, "round trip", "ms", statistics.median(took) * 1e3)
        blocks = self.args.mib * MIB // BLOCK
        began = time.monotonic()
        with connect(SINK) as peer:
            for _ in range(blocks):
                peer.sendall(bytes(BLOCK))
            peer.shutdown(socket.SHUT_WR)
            assert int(peer.recv(16)) == blocks * BLOCK
        self.add(way, "to the guest", "MiB/s", self.args.mib / (time.monotonic() - began))
        began = time.monotonic()
        with connect(SOURCE) as peer:
            peer.sendall(str(blocks).encode())
            assert sum(iter(lambda: len(peer.recv(BLOCK)), 0)) == blocks * BLOCK
        self.add(way, "from the guest", "MiB/s", self.args.mib / (time.monotonic() - began))
        self.add(way, f"{CONNECTIONS} at once", "ms", at_once(connect) * 1e3)

    def resume(self, pid):
        with self.forward() as ports, through(ports[ECHO]) as peer:
            usual = statistics.median(trip(peer) for _ in range(20))
            self.place.run("pause", self.id)
            time.sleep(1)
            # What the supervisor does; the command's own start and end are not measured.
            began = time.monotonic()
            os.kill(pid, signal.SIGCONT)
            trip(peer)
            after = time.monotonic() - began
            self.place.run("resume", self.id)
        self.add("resume", "round trip", "ms", usual * 1e3)
        self.add("resume", "first answer", "ms", after * 1e3)

    def add(self, way, what, unit, value):
        self.table.add((way, what), unit, value)

    def show(self):
        rows = []
        for (way, what), unit, median, *_ in self.table.rows():
            base = self.table.median(("vsock" if way == "forward" else "inside", what), unit)
            rows.append([f"{way}, {what}", unit, self.table.show((way, what), unit, 2), ratio(median, base, 2)])
        print_table(["", "unit", "median (spread)", "to vsock, or inside"], rows)
        forward, vsock = (self.table.median((way, "round trip"), "ms") for way in ("forward", "vsock"))
        print(f"the host's side of a round trip: {forward - vsock:+.3f} ms (budget +0.3)")

    def draw(self, path):
        rows = [(f"{way}, {what}", *spread) for (way, what), unit, *spread, _ in self.table.rows() if unit == "MiB/s"]
        bars_svg(path, "throughput of forwarded connections, MiB/s", rows, lambda name: name.startswith("forward"))


def trip(peer):
    began = time.monotonic()
    peer.sendall(b"x")
    assert peer.recv(1) == b"x"
    return time.monotonic() - began


def through(port):
    peer = socket.create_connection(("127.0.0.1", port))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer


def ask(path, port):
    """A connection as `forkd forward` makes it: monitor, agent, then bytes."""
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(str(path))
    request = json.dumps({"op": "connect", "port": port}).encode()
    peer.sendall(b"CONNECT %d\n" % AGENT_PORT + struct.pack("<BI", 0, len(request)) + request)
    line = b""
    while not line.endswith(b"\n"):
        line += exactly(peer, 1)
    assert line.startswith(b"OK "), line
    _, length = struct.unpack("<BI", exactly(peer, 5))
    answer = json.loads(exactly(peer, length))
    assert answer == {"reply": "ok"}, answer
    return peer


def exactly(peer, count):
    got = b""
    while len(got) < count:
        block = peer.recv(count - len(got))
        assert block, "the stream ended"
        got += block
    return got


def at_once(connect):
    """As many clients as are opened together; from the first to the last answer."""
    failed = []

    def client():
        try:
            with connect(ECHO) as peer:
                trip(peer)
        except (OSError, AssertionError) as error:
            failed.append(error)

    clients = [threading.Thread(target=client) for _ in range(CONNECTIONS)]
    began = time.monotonic()
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    assert not failed, failed[0]
    return time.monotonic() - began


if __name__ == "__main__":
    main(Forward(), __doc__)
