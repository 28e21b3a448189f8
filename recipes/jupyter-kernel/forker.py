"""Processes by fork: one process imports everything, and each that it forks has it all without an import."""

import gc
import os
import signal
import socket
import threading

DESCRIPTORS_MAX = 4


class Forker:
    """Starts the process that forks, in which `prepare()` runs once. It has no threads, which its children would lack.
    `body(channel, ...)` is what each child does: `channel` is its end of a pair of sockets, descriptors may follow."""

    def __init__(self, prepare, body):
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        if os.fork() == 0:
            self._socket.close()
            _serve(theirs, prepare, body)
            os._exit(0)
        theirs.close()
        if not self._socket.recv(1):
            raise SystemExit("what was to be warm could not be imported")

    def fork(self, *descriptors):
        """A new process: its number, and the socket that leads to it. When it ends, the socket does."""
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            socket.send_fds(self._socket, [b"f"], [theirs.fileno(), *descriptors])
            return int.from_bytes(self._socket.recv(4), "little"), ours


def _serve(requests, prepare, body):
    # What is forked must not read the agent's questions, nor write among the answers.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare()
    # Nobody asks how they ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # A collection in a child that walked what is here would copy all of its pages.
    gc.collect()
    gc.freeze()
    requests.send(b"r")
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, 1, DESCRIPTORS_MAX)
        if not request:
            return
        child = os.fork()
        if child == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            body(socket.socket(fileno=descriptors[0]), *descriptors[1:])
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(child.to_bytes(4, "little"))
