"""Warm worker: the code interpreter's interface at port 49999, and `forkd eval` in its Python context.

    GET    /health                  is it up
    POST   /execute                 {"code", "context_id" or "language", "env_vars"}: lines of JSON, while the code runs
    GET    /contexts                [{"id", "language", "cwd"}]
    POST   /contexts                {"language", "cwd"}: a new one
    POST   /contexts/ID/restart     its state is gone, its id stays
    DELETE /contexts/ID

A run whose client goes away is interrupted."""

import json
import os
import select
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), "/forkd/workers", "/opt/forkd"]

import forkd_worker
from contexts import Contexts, Unknown, language_of
import rehearsal
from forker import Forker

PORT = 49999
# Seconds: how often a run is looked at, how soon it is noticed that its client has gone, and how long a stream is silent,
# which clients do not like.
LOOK = 0.5
LOOKS_AN_INTERRUPT = 4
LOOKS_A_KEEPALIVE = 120
STARTED = time.monotonic()


def say(what):
    """On the console while the machine is built."""
    print(f"worker: {what} after {time.monotonic() - STARTED:.1f} s", file=sys.stderr, flush=True)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    # An answer is not to wait for the acknowledgement of its head.
    disable_nagle_algorithm = True
    contexts = None

    def do_GET(self):
        if self.path == "/health":
            return self.answer(200, "OK", "text/plain")
        if self.path == "/contexts":
            return self.answer(200, [context.shown() for context in self.contexts.by_id.values()])
        self.answer(404, f"nothing is at {self.path}", "text/plain")

    def do_POST(self):
        self.refusing(self.post)

    def do_DELETE(self):
        self.refusing(self.delete)

    def post(self):
        parts = self.path.strip("/").split("/")
        request = self.request_body()
        if parts == ["execute"]:
            self.execute(request)
        elif parts == ["contexts"]:
            language = language_of(request.get("language"))
            self.answer(200, self.contexts.create(language, request.get("cwd")).shown())
        elif len(parts) == 3 and parts[0] == "contexts" and parts[2] == "restart":
            self.contexts.get(parts[1]).restart()
            self.answer(204)
        else:
            self.answer(404, f"nothing is at {self.path}", "text/plain")

    def delete(self):
        kind, _, name = self.path.strip("/").partition("/")
        if kind != "contexts":
            return self.answer(404, f"nothing is at {self.path}", "text/plain")
        self.contexts.remove(name)
        self.answer(204)

    def execute(self, request):
        code, name, language = request.get("code"), request.get("context_id"), request.get("language")
        if not isinstance(code, str):
            raise ValueError("a request without code")
        if name and language:
            raise ValueError("a request with a context and a language: a context has its language")
        context = self.contexts.get(name) if name else self.contexts.default(language_of(language))
        # At once: a client waits for this before it waits for what the code does.
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with context.turn:
            self.stream(context.run(code, request.get("env_vars") or {}, self.chunk))
        self.chunk(b'{"type": "end_of_execution"}\n')
        self.write(b"0\r\n\r\n")

    def stream(self, process):
        """Until the run is over: its lines are written by the process's own thread."""
        looks = 0
        while not process.ended.wait(LOOK):
            looks += 1
            if looks % LOOKS_A_KEEPALIVE == 0:
                self.chunk(b'{"type": "keepalive"}\n')
            # Not at each look: what an interrupt leads to takes a moment, too.
            if looks % LOOKS_AN_INTERRUPT == 1 and self.gone():
                process.interrupt()
        if not process.alive:
            line = {"type": "error", "name": "ContextEnded", "value": "the process that ran the code has ended"}
            self.chunk(json.dumps({**line, "traceback": ""}).encode() + b"\n")

    def gone(self):
        """Whether the client has closed the connection."""
        ready = select.poll()
        ready.register(self.connection, select.POLLRDHUP)
        return self.close_connection or bool(ready.poll(0))

    def chunk(self, line):
        self.write(b"%x\r\n%s\r\n" % (len(line), line))

    def write(self, data):
        try:
            self.wfile.write(data)
        except OSError:
            # It is noticed by whoever waits for the run.
            self.close_connection = True

    def request_body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(iter(self.next_chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = json.loads(body or b"{}")
        if not isinstance(request, dict):
            raise ValueError("a body that is no JSON object")
        return request

    def next_chunk(self):
        size = int(self.rfile.readline().split(b";")[0], 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk

    def refusing(self, handle):
        try:
            handle()
        except Unknown as error:
            self.answer(404, str(error), "text/plain")
        except ValueError as error:
            self.answer(400, str(error), "text/plain")

    def answer(self, status, body=None, kind="application/json"):
        text = body if isinstance(body, str) else json.dumps(body)
        data = b"" if body is None else text.encode()
        self.send_response(status)
        if body is not None:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.write(data)

    def log_message(self, *arguments):
        pass


def evaluate(contexts, code):
    """What `forkd eval` asks: the default Python context's answer."""
    lines = []
    context = contexts.default("python")
    with context.turn:
        context.run(code, {}, lines.append).ended.wait()
    answer = {"answer": None, "error": None, "output": ""}
    for line in map(json.loads, lines):
        if line["type"] == "stdout":
            answer["output"] += line["text"]
        elif line["type"] == "error":
            answer["error"] = line["traceback"]
        elif line["type"] == "result" and line["is_main_result"]:
            answer["answer"] = line.get("text")
    return answer


def prepare():
    import scientific

    say("numpy, scipy, pandas and matplotlib are imported")
    import python_context

    scientific.rehearse()
    python_context.prepare()
    say("IPython is there")


def body(channel, output, errors):
    import python_context

    python_context.run(channel, output, errors)


def main():
    contexts = Contexts(Forker(prepare, body))
    contexts.prepare()
    say("the contexts are there")
    Handler.contexts = contexts
    server = ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 3600}, daemon=True).start()
    rehearsal.run(contexts, PORT)
    say("rehearsed")
    forkd_worker.on_copy(contexts.copied)
    forkd_worker.serve(elsewhere=lambda code: evaluate(contexts, code))


if __name__ == "__main__":
    main()
