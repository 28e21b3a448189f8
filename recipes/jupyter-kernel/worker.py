"""Warm worker: an IPython kernel that was forked off a process with everything imported, at fixed ports. When it ends,
because a client asked for it or by itself, one that waits takes its place, with the same connection file."""

import json
import os
import secrets
import select
import sys
import threading
import time

sys.path[:0] = ["/forkd/workers", os.path.dirname(os.path.abspath(__file__))]

import forkd_worker
from forker import Forker

PORTS = {"shell_port": 50001, "iopub_port": 50002, "stdin_port": 50003, "control_port": 50004, "hb_port": 50005}
CONNECTION_FILE = "kernel.json"
# Seconds; what the rehearsal may take where KVM emulates the guest's kernel.
LIMIT = 1200
# How long after a change of kernels the next one is made, which takes processor time of the one that is used.
SETTLED_MS = 5000
# What a child of the forking process is told first.
KERNEL, CLIENT = b"k", b"c"
STARTED = time.monotonic()


def say(what):
    """On the console while the machine is built."""
    print(f"worker: {what} after {time.monotonic() - STARTED:.1f} s", file=sys.stderr, flush=True)


def prepare():
    import scientific

    say("numpy, scipy, pandas and matplotlib are imported")
    import kernel
    import rehearsal

    say("ipykernel is imported")
    scientific.rehearse()
    say("the packages are rehearsed")


def body(channel):
    """A child of the forking process: a kernel, or before the snapshot a client of it."""
    import kernel
    import rehearsal

    if channel.recv(1) == KERNEL:
        kernel.run(channel)
    else:
        rehearsal.run(json.loads(channel.makefile("rb").readline()), LIMIT)
        channel.sendall(b"ok")


class Kernel:
    """One kernel, as the worker sees it."""

    def __init__(self, forker, key, env):
        _, self.channel = forker.fork()
        self.lines = self.channel.makefile("rb")
        self.channel.sendall(KERNEL)
        self.ports = self.become(key, env)

    def ask(self, request):
        """What it answers; None when it has ended."""
        try:
            self.channel.sendall(json.dumps(request).encode() + b"\n")
            line = self.lines.readline()
        except OSError:
            return None
        return json.loads(line) if line else None

    def become(self, key, env):
        return self.ask({"op": "become", "key": key, "env": env})

    def listen(self):
        self.ask({"op": "listen", "ports": PORTS})


class Kernels:
    """The kernel that is used, and one that waits to take its place."""

    def __init__(self, forker):
        self.forker = forker
        self.key = secrets.token_hex(32)
        self.env = {}
        self.in_copy = False
        # Who asks one of them something, or changes which they are.
        self.lock = threading.Lock()
        self.used, self.next = self.start(), self.start()
        self.used.listen()

    def start(self):
        return Kernel(self.forker, self.key, self.env)

    def watch(self):
        """Has the next kernel take the place of one that has ended, and starts another when that has settled."""
        while True:
            ends = select.poll()
            for kernel in filter(None, (self.used, self.next)):
                ends.register(kernel.channel, select.POLLRDHUP)
            ended = [descriptor for descriptor, _ in ends.poll(None if self.next else SETTLED_MS)]
            with self.lock:
                if self.next is None or self.next.channel.fileno() in ended:
                    self.next = self.start()
                if self.used.channel.fileno() in ended:
                    self.used, self.next = self.next, None
                    self.used.listen()

    def answer(self, code):
        with self.lock:
            answer = self.used.ask({"op": "eval", "code": code})
        return answer or {"answer": None, "error": "the kernel ended while it ran this; there is a new one"}

    def copied(self, seed, env):
        """In a copy: another key than any other copy's, and only then the file that says so."""
        with self.lock:
            self.key = secrets.token_hex(32)
            self.env.update(env)
            for kernel in filter(None, (self.used, self.next)):
                kernel.become(self.key, self.env)
            with open(CONNECTION_FILE + ".new", "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                json.dump(self.connection(PORTS), file, indent=1)
            os.rename(CONNECTION_FILE + ".new", CONNECTION_FILE)
            if not self.in_copy:
                # This was the library's rehearsal: a copy is not to show the key of before the snapshot.
                os.remove(CONNECTION_FILE)
                self.in_copy = True

    def connection(self, ports):
        fixed = {"transport": "tcp", "ip": "127.0.0.1", "signature_scheme": "hmac-sha256", "kernel_name": "python3"}
        return {**fixed, **ports, "key": self.key}

    def restart(self):
        """Has a client ask for it."""
        self.client(PORTS, restart=True)

    def rehearse(self, kernel, ports):
        """Has a client do what clients do first, and the kernel forget it."""
        self.client(ports, restart=False)
        with self.lock:
            kernel.ask({"op": "forget"})

    def client(self, ports, restart):
        _, channel = self.forker.fork()
        channel.sendall(CLIENT + json.dumps({**self.connection(ports), "restart": restart}).encode() + b"\n")
        if channel.recv(2) != b"ok":
            sys.exit("the rehearsal failed")


def main():
    kernels = Kernels(Forker(prepare, body))
    say("two kernels are up")
    threading.Thread(target=kernels.watch, daemon=True).start()
    kernels.restart()
    say("the second took the place of the first")
    kernels.rehearse(kernels.used, PORTS)
    while kernels.next is None:
        time.sleep(1)
    kernels.rehearse(kernels.next, kernels.next.ports)
    say("both are rehearsed")
    forkd_worker.on_copy(kernels.copied)
    forkd_worker.serve(elsewhere=kernels.answer)


if __name__ == "__main__":
    main()
