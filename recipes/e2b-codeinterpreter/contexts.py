"""Contexts: processes that run code and keep its state. One run at a time in each."""

import codecs
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
import uuid

PYTHON = "python"
NODE = "javascript"
TYPESCRIPT = "typescript"
NAMES = {"python": PYTHON, "javascript": NODE, "js": NODE, "typescript": TYPESCRIPT, "ts": TYPESCRIPT}
HOME = os.environ.get("HOME", "/")
FIRST = b'"number_of_executions"'
END = b'{"type": "end_of_execution"}\n'


class Unknown(Exception):
    """A context that is not there; its text is for whoever asked."""


def language_of(name):
    try:
        return NAMES[(name or PYTHON).lower()]
    except KeyError:
        raise ValueError(f"no language {name!r} here: python, javascript and typescript") from None


class Process:
    """A process that runs code. It speaks lines of JSON over a socket, and what it prints comes through two pipes. One
    thread reads all three, so that it never waits for somebody to read."""

    def __init__(self, start):
        output, theirs_output = os.pipe()
        errors, theirs_errors = os.pipe()
        self.pid, self.channel = start(theirs_output, theirs_errors)
        os.close(theirs_output)
        os.close(theirs_errors)
        self.pipes = {output: ("stdout", codecs.getincrementaldecoder("utf-8")("replace"))}
        self.pipes[errors] = ("stderr", codecs.getincrementaldecoder("utf-8")("replace"))
        self.emit = None
        self.ended = threading.Event()
        self.alive = True
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, request, emit=None):
        """Sends a request; `emit(line)` is called for each line that comes of it, and `ended` set behind the last one."""
        self.emit = emit
        self.ended.clear()
        try:
            self.channel.sendall(json.dumps(request).encode() + b"\n")
        except OSError:
            self.alive = False
        if not self.alive:
            self.ended.set()

    def interrupt(self):
        """The code that runs, and the programs that it started."""
        self._signal(signal.SIGINT)

    def kill(self):
        self._signal(signal.SIGKILL)

    def _signal(self, number):
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-self.pid, number)

    def _read(self):
        ready = select.poll()
        ready.register(self.channel, select.POLLIN)
        for pipe in self.pipes:
            ready.register(pipe, select.POLLIN)
        rest = b""
        while True:
            events = [descriptor for descriptor, _ in ready.poll()]
            if self.channel.fileno() not in events:
                for pipe in events:
                    self._print(pipe)
                continue
            try:
                received = self.channel.recv(1 << 16)
            except OSError:
                received = b""
            if not received:
                break
            *lines, rest = (rest + received).split(b"\n")
            for line in lines:
                self._line(line + b"\n")
        self.alive = False
        self.channel.close()
        for pipe in self.pipes:
            os.close(pipe)
        self.ended.set()

    def _line(self, line):
        if FIRST not in line[:40]:
            # What was printed before it goes first.
            for pipe in self.pipes:
                self._print(pipe)
        if line == END:
            self.ended.set()
        elif self.emit:
            self.emit(line)

    def _print(self, pipe):
        kind, decoder = self.pipes[pipe]
        while select.select([pipe], [], [], 0)[0]:
            printed = os.read(pipe, 1 << 16)
            if not printed:
                break
            text = decoder.decode(printed)
            if text and self.emit:
                line = {"type": kind, "text": text, "timestamp": time.time_ns()}
                self.emit(json.dumps(line).encode() + b"\n")


class Context:
    """What a client calls a context: a process, and after a restart another one."""

    def __init__(self, contexts, language, cwd):
        self.id = str(uuid.uuid4())
        self.language, self.cwd = language, cwd
        self.contexts = contexts
        # Who runs something in it; others wait.
        self.turn = threading.Lock()
        self.process = contexts.process(language)
        self._settle()

    def _settle(self):
        self.process.ask({"op": "become", "env": self.contexts.env, "cwd": self.cwd})
        self.process.ended.wait()

    def shown(self):
        return {"id": self.id, "language": self.language, "cwd": self.cwd}

    def run(self, code, env_vars, emit):
        """Starts it; the process's `ended` says when it is over."""
        if not self.process.alive:
            # It ended by itself: what asks next gets a new one.
            self.renew()
        request = {"op": "run", "code": code, "env_vars": env_vars}
        if self.language == TYPESCRIPT:
            request["typescript"] = True
        self.process.ask(request, emit)
        return self.process

    def renew(self):
        self.process = self.contexts.process(self.language)
        self._settle()

    def forget(self):
        """What the rehearsal left behind."""
        self.process.ask({"op": "forget"})
        self.process.ended.wait()

    def restart(self):
        """Whatever runs ends; a new process takes the old one's place."""
        self.process.kill()
        with self.turn:
            self.renew()

    def close(self):
        self.process.kill()


class Contexts:
    """All of them, those that are there without being made by name, and processes for the next ones."""

    def __init__(self, forker):
        self.forker = forker
        self.env = {}
        self.by_id = {}
        self.defaults = {}
        self.spare_node = None
        self.lock = threading.Lock()

    def process(self, language):
        """A new process for a language."""
        if language == PYTHON:
            return Process(self.forker.fork)
        spare, self.spare_node = self.spare_node, None
        return spare or Process(start_node)

    def prepare(self):
        """Before the snapshot: a context of each kind, and a Node that waits, because to start one takes long."""
        self.default(PYTHON)
        self.default(NODE)
        self.spare_node = Process(start_node)
        self.spare_node.ask({"op": "become", "env": {}, "cwd": HOME})
        self.spare_node.ended.wait()

    def default(self, language):
        """Without a context: one for each language, made when it is asked for."""
        with self.lock:
            if language not in self.defaults:
                self.defaults[language] = self.create(language, HOME)
            return self.defaults[language]

    def create(self, language, cwd):
        cwd = cwd or HOME
        if not os.path.isdir(cwd):
            raise ValueError(f"no directory {cwd!r} to run code in")
        context = Context(self, language, cwd)
        self.by_id[context.id] = context
        return context

    def get(self, name):
        try:
            return self.by_id[name]
        except KeyError:
            raise Unknown(f"Context {name} not found") from None

    def remove(self, name):
        context = self.get(name)
        del self.by_id[name]
        for language in [language for language, default in self.defaults.items() if default is context]:
            del self.defaults[language]
        context.close()

    def copied(self, seed, env):
        """In a copy: all of them get its variables, and random numbers of their own."""
        self.env.update(env)
        for context in list(self.by_id.values()):
            with context.turn:
                context._settle()
        if self.spare_node:
            self.spare_node.ask({"op": "become", "env": self.env, "cwd": HOME})
            self.spare_node.ended.wait()


def start_node(output, errors):
    """Node, with its channel as descriptor 3."""
    ours, theirs = socket.socketpair()
    here = os.path.dirname(os.path.abspath(__file__))
    node = subprocess.Popen(
        ["/usr/local/bin/node", "--disable-warning=ExperimentalWarning", os.path.join(here, "node_context.js")],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        pass_fds=[theirs.fileno()],
        env={**os.environ, "FORKD_CHANNEL": str(theirs.fileno())},
        process_group=0,
    )
    theirs.close()
    return node.pid, ours
