"""Warm workers in Python: import what should be warm, then `serve`.

    import sys
    sys.path.insert(0, "/forkd/workers")
    import forkd_worker
    import numpy

    @forkd_worker.on_copy
    def reseed(seed, env): ...

    forkd_worker.serve({"numpy": numpy})

The protocol is one line of JSON in, one line of JSON out; `serve` speaks it:

In:  {"op": "eval", "code": "..."}          statements; if the last is an expression, its repr is the answer
     {"op": "resumed", "seed": "hex", "env": {...}}
                                            this process is now a copy; no reply
Out: {"ready": true}                        once
     {"answer": ..., "error": ..., "output": ...}    per eval: repr of the value, traceback, what was printed

Names assigned in one eval are there in the next, as at a Python prompt. `await` works at the top level, always in the
same event loop. SIGINT ends the code that runs, with KeyboardInterrupt as its error; between two evals it does nothing.
"""

import ast
import contextlib
import gc
import inspect
import io
import json
import os
import random
import signal
import sys
import traceback

# The agent takes no longer line, and escapes may make a letter six bytes.
LINE_MAX = (1 << 20) - 1024
OUTPUT_MAX = 256 << 10

# Where evaluated code awaits; made when it is needed, unless a worker has a loop of its own that it puts here.
loop = None

_hooks = []


def on_copy(hook):
    """Has `hook(seed, env)` called in every copy before its first eval: 32 bytes that no other copy has, and the
    variables that the copy was given, which are in os.environ by then."""
    _hooks.append(hook)
    return hook


class _Output(io.StringIO):
    """What was printed, up to a limit."""

    dropped = 0

    def write(self, text):
        room = max(0, OUTPUT_MAX - self.tell())
        if len(text) > room:
            self.dropped += len(text) - room
        super().write(text[:room])
        return len(text)

    def text(self):
        note = f"\n... and {self.dropped} characters more\n" if self.dropped else ""
        return self.getvalue() + note


def _await(value):
    """Runs a coroutine in the worker's event loop."""
    global loop
    if loop is None:
        import asyncio

        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
    return loop.run_until_complete(value)


def _run(code, names):
    value = eval(code, names)
    return _await(value) if code.co_flags & inspect.CO_COROUTINE else value


def evaluate_python(code, names):
    """Run statements; if the last one is an expression, return its repr unless it is None."""
    tree = ast.parse(code.strip(), "<eval>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    _run(compile(tree, "<eval>", "exec", flags), names)
    if last is None:
        return None
    value = _run(compile(ast.Expression(last.value), "<eval>", "eval", flags), names)
    return None if value is None else repr(value)


def answer(code, names, evaluate=evaluate_python):
    """Evaluate code that may raise anything, SystemExit included."""
    output = _Output()
    result = {"answer": None, "error": None}
    with contextlib.redirect_stdout(output):
        try:
            # Here, so that an interrupt at any moment is this code's.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            result["answer"] = evaluate(code, names)
        except BaseException:
            # Without the frames of this file, which are the same in every traceback.
            kind, error, trace = sys.exc_info()
            while trace and trace.tb_frame.f_code.co_filename == __file__:
                trace = trace.tb_next
            if isinstance(error, SyntaxError) and error.filename == "<eval>":
                trace = None
            result["error"] = "".join(traceback.format_exception(kind, error, trace)).rstrip()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    if output.getvalue():
        result["output"] = output.text()
    return result


def _line(message):
    """A message as the agent takes it: an answer that is too long becomes an error that says so."""
    line = json.dumps(message).encode() + b"\n"
    if len(line) <= LINE_MAX:
        return line
    value = message.get("answer") or message.get("error") or ""
    why = f"the answer has {len(value)} characters, too many for one line: write it to a file and copy that"
    return json.dumps({"answer": None, "error": why}).encode() + b"\n"


def serve(names=None, rehearse=(), evaluate=evaluate_python, elsewhere=None):
    """Says that the worker is ready, then answers until the agent is gone. `names` are what evaluated code sees;
    `rehearse` is code to evaluate before the snapshot with names of its own, so that no copy is the first to do it.
    `evaluate(code, names)` returns an answer for code of another language, or raises. `elsewhere(code)` is for a worker that
    has another process evaluate: it returns the whole reply, a dict as `answer` makes it."""
    # The protocol gets descriptors of its own: code that reads standard input finds its end, and whatever writes to
    # descriptor 1 goes to standard error.
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)

    def reply(message):
        line = memoryview(_line(message))
        while line:
            line = line[replies.write(line) :]

    names = {"__name__": "__main__", **(names or {})}
    # Once before the snapshot, so that no copy has to map code that it runs first: a page costs it 1 ms where KVM emulates
    # the guest's kernel.
    _resume(os.urandom(32), {})
    for code in rehearse:
        failed = answer(code, dict(names), evaluate)["error"]
        if failed:
            sys.exit(f"the rehearsal failed: {failed}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What is imported stays: a collection in a copy that walked all of it would make every page of it private.
    gc.collect()
    gc.freeze()
    reply({"ready": True})
    for line in requests:
        request = json.loads(line)
        if request["op"] == "resumed":
            _resume(bytes.fromhex(request["seed"]), request.get("env", {}))
        elif request["op"] == "eval":
            reply(elsewhere(request["code"]) if elsewhere else answer(request["code"], names, evaluate))


def _resume(seed, env):
    """What makes a copy another than its siblings. A hook that fails is told, and the next one called."""
    os.environ.update(env)
    random.seed(seed)
    for hook in _hooks:
        try:
            hook(seed, env)
        except Exception:
            traceback.print_exc()
