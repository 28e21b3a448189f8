#!/usr/bin/env python3
"""What a network costs a fork: `--net nat` and `--net isolated` against `--net none`; and what the gateway carries.

    benches/net.py FORKD [--runs 5] [--counts 1,100] [--tag python-numpy] [--mib 16] [--csv FILE] [--svg FILE]

Per count and network, one after the other in each run: milliseconds from process start to the last child's first
instruction, ready and answer. The difference to none is for each child.

And what a child of `--net nat` sends to, and receives from, a TCP server of this host (one connection, `--mib` MiB each
way), and how long a byte there and back takes (the median of 100). The server is this script; the rule that opens it names
its address, so the host needs one that is not its loopback's. Without such an address this part is left out.

Needs: /dev/kvm and the snapshot of --tag (`make machine`), whose worker evaluates Python.
"""

import json
import socket
import threading

from common import TIMES, Machine, note
from harness import Bench, device, main, numbers, settle, snapshot
from samples import print_table, ratio
from svg import dots_svg

NETWORKS = ["none", "isolated", "nat"]
ROUND_TRIPS = 100

# What the child does; prints MiB/s sent and received, and ms for a round trip.
CLIENT = """
import json, socket, time
def connect(kind):
    s = socket.create_connection(({address!r}, {port}), 10)
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    s.sendall(kind)
    return s
size = {mib} << 20
s, start = connect(b's'), time.monotonic()
s.sendall(bytes(size)); s.shutdown(socket.SHUT_WR); s.recv(1)
sent = time.monotonic() - start
s, start, left = connect(b'r'), time.monotonic(), size
s.sendall(b'%16d' % size)
while left: left -= len(s.recv(1 << 20))
received = time.monotonic() - start
s, trips = connect(b'e'), []
for _ in range({trips}):
    start = time.monotonic(); s.sendall(b'x'); s.recv(1); trips.append(time.monotonic() - start)
json.dumps([{mib} / sent, {mib} / received, sorted(trips)[{trips} // 2] * 1000])
"""


def own_address():
    """An address of this host that is not its loopback's, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            # Nothing is sent: the kernel only looks which way it would be.
            asking.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return asking.getsockname()[0]


def serve(connection):
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kind = connection.recv(1)
        if kind == b"s":
            while connection.recv(1 << 20):
                pass
            connection.sendall(b".")
        elif kind == b"r":
            connection.sendall(bytes(int(connection.recv(16, socket.MSG_WAITALL))))
        else:
            while byte := connection.recv(1):
                connection.sendall(byte)


def listen(address):
    server = socket.create_server((address, 0))

    def accept():
        while True:
            threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return server.getsockname()[1]


class Net(Bench):
    names = ("what", "network", "of")
    settles = True

    def options(self, parser):
        parser.add_argument("--counts", type=numbers, default=[1, 100])
        parser.add_argument("--tag", default="python-numpy")
        parser.add_argument("--mib", type=int, default=16)

    def needs(self):
        return [device("/dev/kvm"), snapshot(self.args.tag)]

    def prepare(self):
        self.machine = Machine.of_user(self.place, self.args.tag)
        self.address = own_address()
        self.port = self.address and listen(self.address)

    def round(self, number):
        for count in self.args.counts:
            for network in NETWORKS:
                settle()
                note(f"  {count} children, {network}")
                self.fork(count, network)
        if self.address:
            settle()
            self.carry()

    def fork(self, count, network):
        what = ("--tag", self.args.tag, "-n", count, "--net", network, *self.machine.ask)
        children = self.place.fork(*what)["children"]
        failed = [child for child in children if not self.machine.is_right(child)]
        self.table.add((count, network, "failed"), "children", len(failed))
        for name, field in TIMES.items():
            times = [child[field] for child in children if child[field] is not None]
            if times:
                self.table.add((count, network, name), "ms", max(times))

    def carry(self):
        code = CLIENT.format(address=self.address, port=self.port, mib=self.args.mib, trips=ROUND_TRIPS)
        rule = f"{self.address}:{self.port}"
        report = self.place.fork("--tag", self.args.tag, "--net", "nat", "--allow", rule, "--eval", code.strip())
        (child,) = report["children"]
        assert child["answer"], child
        # The worker shows the text as Python does, in quotes.
        sent, received, trip = json.loads(child["answer"].strip("'"))
        for name, unit, value in (("sent", "MiB/s", sent), ("received", "MiB/s", received), ("round trip", "ms", trip)):
            self.table.add(("one child", "nat", name), unit, value)

    def show(self):
        rows = []
        for count in self.args.counts:
            for network in NETWORKS:
                cells = [self.table.show((count, network, name), "ms") for name in TIMES]
                first, none = (self.table.median((count, which, "first instruction"), "ms") for which in (network, "none"))
                each = "-" if network == "none" or None in (first, none) else f"{(first - none) / count:+.2f}"
                failed = sum(self.table.samples[((count, network, "failed"), "children")])
                rows.append([f"{count} {network}", *cells, ratio(first, none, 2), each, failed])
        headings = ["children, network", *(f"last {name}, ms" for name in TIMES), "to none", "ms each", "failed"]
        print_table(headings, rows)
        if self.address:
            carried = [("sent", "MiB/s"), ("received", "MiB/s"), ("round trip", "ms")]
            print_table(["one child of nat", ""], [[f"{n}, {u}", self.table.show(("one child", "nat", n), u)] for n, u in carried])

    def draw(self, path):
        rows = []
        for count in self.args.counts:
            for name in TIMES:
                dots = {network: self.table.spread((count, network, name), "ms") for network in NETWORKS}
                rows.append((f"last {name}, {count} children", {network: dot for network, dot in dots.items() if dot}))
        dots_svg(path, "milliseconds from process start, median and spread over the runs", rows)


if __name__ == "__main__":
    main(Net(), __doc__)
