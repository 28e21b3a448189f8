"""Warm worker: imports numpy, says it is ready, then evaluates one line of JSON after the other.

In:  {"op": "eval", "code": "..."}          an expression, or statements
     {"op": "resumed", "seed": "hex", "env": {...}}
                                            this process is now a copy: seed every generator anew and take on the
                                            copy's own environment; no reply
Out: {"ready": true}                        once
     {"answer": ..., "error": ..., "output": ...}    per eval: repr of the value, traceback, what was printed

Names assigned in one eval are there in the next, as at a Python prompt.
"""

import ast
import contextlib
import gc
import io
import json
import os
import random
import sys
import traceback

import numpy


def reseed(seed):
    """Give every copy random numbers of its own; numpy's legacy generator takes 32-bit words."""
    random.seed(seed)
    words = [int.from_bytes(seed[i : i + 4], "little") for i in range(0, len(seed), 4)]
    numpy.random.seed(words)


def evaluate(code, names):
    """Run statements; if the last one is an expression, return its repr unless it is None."""
    tree = ast.parse(code.strip(), "<eval>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<eval>", "exec"), names)
    if last is None:
        return None
    value = eval(compile(ast.Expression(last.value), "<eval>", "eval"), names)
    return None if value is None else repr(value)


def answer(code, names):
    """Evaluate code that may raise anything, SystemExit included."""
    output = io.StringIO()
    result = {"answer": None, "error": None}
    with contextlib.redirect_stdout(output):
        try:
            result["answer"] = evaluate(code, names)
        except BaseException:
            # Without the frames of this file, which are the same in every traceback.
            kind, error, trace = sys.exc_info()
            while trace and trace.tb_frame.f_code.co_filename == __file__:
                trace = trace.tb_next
            result["error"] = "".join(traceback.format_exception(kind, error, trace)).rstrip()
    if output.getvalue():
        result["output"] = output.getvalue()
    return result


def main():
    # The protocol gets descriptors of its own: code that reads standard input finds its end, and whatever writes to
    # descriptor 1 goes to standard error.
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)

    def reply(message):
        line = memoryview(json.dumps(message).encode() + b"\n")
        while line:
            line = line[replies.write(line) :]

    names = {"__name__": "__main__", "numpy": numpy, "np": numpy}
    # Once before the snapshot, so that no copy has to map code it runs first: a page costs it 1 ms where KVM emulates the
    # guest's kernel.
    reseed(os.urandom(64))
    answer("numpy.random.rand()", dict(names))
    # What is imported stays: a collection in a copy that walked all of it would make every page of it private.
    gc.collect()
    gc.freeze()
    reply({"ready": True})
    for line in requests:
        request = json.loads(line)
        if request["op"] == "resumed":
            reseed(bytes.fromhex(request["seed"]))
            os.environ.update(request.get("env", {}))
        elif request["op"] == "eval":
            reply(answer(request["code"], names))


if __name__ == "__main__":
    main()
