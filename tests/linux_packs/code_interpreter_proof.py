"""What a client of the code interpreter's interface does: code_interpreter_proof.py PORT. Plain HTTP, as the SDK speaks
it. Prints what came of it as one JSON document."""

import base64
import json
import struct
import sys
import time
from http.client import HTTPConnection

# Seconds; KVM may emulate the guest's kernel, and much else may run.
LIMIT = 600
PORT = int(sys.argv[1])
SAID = {"seconds": {}}
PLOT = """import matplotlib.pyplot as plt
plt.plot([1, 2, 3], [4, 5, 9], label='grown')
plt.title('Growth')
plt.xlabel('year')
plt.show()"""
RICH = """from IPython.display import *
display(HTML('<b>h</b>'))
display(JSON({'a': 1}))
display(Markdown('*m*'))
Latex('$l$')"""
IMPORTS = """import path, { sep } from 'path'
import * as os from 'node:os'
[path.join('a', 'b'), sep, typeof os.cpus]"""


def connection():
    return HTTPConnection("127.0.0.1", PORT, timeout=LIMIT)


def ask(method, path, body=None):
    """Status, and what was answered: JSON or text."""
    asked = connection()
    data = None if body is None else json.dumps(body)
    asked.request(method, path, data, {"Content-Type": "application/json"})
    answer = asked.getresponse()
    text = answer.read().decode()
    kind = answer.getheader("Content-Type", "")
    asked.close()
    return answer.status, json.loads(text) if kind == "application/json" and text else text


def lines(code, **more):
    """The lines of a run, as they come, each with when that was."""
    asked = connection()
    asked.request("POST", "/execute", json.dumps({"code": code, **more}), {"Content-Type": "application/json"})
    answer = asked.getresponse()
    assert answer.status == 200, answer.read()
    assert answer.getheader("Content-Type").startswith("application/x-ndjson")
    started = time.monotonic()
    while line := answer.readline():
        yield {**json.loads(line), "at": time.monotonic() - started}
    asked.close()


class Execution:
    """A run to its end, taken apart as the SDK does."""

    def __init__(self, code, **more):
        self.results, self.error, self.count = [], None, None
        self.out = {"stdout": "", "stderr": ""}
        for line in lines(code, **more):
            kind = line["type"]
            if kind in self.out:
                assert isinstance(line["timestamp"], int)
                self.out[kind] += line["text"]
            elif kind == "result":
                self.results.append(line)
            elif kind == "error":
                self.error = line
            elif kind == "number_of_executions":
                self.count = line["execution_count"]
        self.last = kind
        mains = [result.get("text") for result in self.results if result["is_main_result"]]
        self.text = mains[0] if mains else None


def timed(name, act):
    started = time.monotonic()
    came = act()
    SAID["seconds"][name] = round(time.monotonic() - started, 3)
    return came


def python():
    said = SAID["python"] = {}
    first = timed("python 1 + 1", lambda: Execution("1 + 1"))
    said["sum"], said["last"] = first.text, first.last
    said["string"] = Execution("x = 'it is kept'\nx").text
    again = Execution("print(x)\nimport sys; print('oops', file=sys.stderr)")
    said["kept"], said["counted"] = again.out, again.count - first.count
    said["child"] = Execution("import subprocess; _ = subprocess.run(['echo', 'from a child'])").out["stdout"]
    said["awaited"] = Execution("import asyncio\nawait asyncio.sleep(0.01)\n7").text
    error = Execution("def f():\n    return 1 / 0\nf()").error
    said["error"] = [error["name"], error["value"], "in f()" in error["traceback"]]
    said["syntax"] = Execution("(").error["name"]
    said["unicode"] = Execution("print('Grüße, 世界 🎈')").out["stdout"]
    said["env"] = [
        Execution("import os; os.environ.get('A')", env_vars={"A": "b"}).text,
        Execution("os.environ.get('A')").text,
        Execution("os.environ['GIVEN']").text,
    ]
    code = "import random, numpy, uuid\n[random.random(), numpy.random.rand(), uuid.uuid4().hex]"
    said["random"] = Execution(code).text
    names = "('numpy', 'scipy.stats', 'pandas', 'matplotlib.pyplot')"
    said["imported"] = Execution(f"[name for name in {names} if name not in sys.modules]").text

    plot = timed("python plot", lambda: Execution(PLOT)).results[0]
    png = base64.b64decode(plot["png"])
    width, height = struct.unpack(">II", png[16:24])
    said["plot"] = [png[:8].hex(), width > 300 and height > 200, len(png) > 5000]
    chart = plot["chart"]
    said["chart"] = [chart["type"], chart["title"], chart["x_label"], chart["elements"][0]["points"]]
    frame = Execution("import pandas as pd\npd.DataFrame({'a': [1, 2], 'b': ['x', 'y']})").results[0]
    said["frame"] = [frame["data"], "<table" in frame["html"], frame["text"].split()]
    said["rich"] = [
        [result.get("html"), result.get("json"), result.get("markdown"), result.get("latex"), result["is_main_result"]]
        for result in Execution(RICH).results
    ]


def javascript():
    said = SAID["javascript"] = {}
    first = timed("javascript 1 + 1", lambda: Execution("1 + 1", language="javascript"))
    said["sum"], said["count"], said["last"] = first.text, first.count, first.last

    def js(code, **more):
        return Execution(code, language="js", **more)

    said["kept"] = [js("const x = 'it is kept'; x").text, js("x.length").text]
    said["declared_again"] = js("const x = 'again'\nclass A { n() { return x } }\nnew A().n()").text
    said["printed"] = js("console.log('out'); console.error('err')").out
    said["awaited"] = js("await new Promise((resolve) => setTimeout(() => resolve(7), 10))").text
    said["imported"] = js(IMPORTS).results[0]["json"]
    error = js("function f() { throw new TypeError('no') }\nf()").error
    said["error"] = [error["name"], error["value"], "at f (" in error["traceback"]]
    said["env"] = [
        js("process.env.A", env_vars={"A": "b"}).text,
        js("String(process.env.A)").text,
        js("process.env.GIVEN").text,
    ]
    said["random"] = js("[Math.random(), crypto.randomUUID()].join()").text
    said["typescript"] = Execution("enum E { A = 3 }\nconst y: number = E.A + 1\ny", language="typescript").text


def streams():
    """What is printed comes while the code runs: the second line long before the last."""
    code = {
        "python": "import time\nfor i in range(3):\n    print(i)\n    time.sleep(1.5)",
        "javascript": "for (let i = 0; i < 3; i++) { console.log(i); await new Promise((r) => setTimeout(r, 1500)); }",
    }
    said = SAID["streams"] = {}
    for language, code in code.items():
        came = list(lines(code, language=language))
        printed = [line for line in came if line["type"] == "stdout"]
        said[language] = ["".join(line["text"] for line in printed), came[-1]["at"] - printed[0]["at"] > 2.5]


def contexts():
    said = SAID["contexts"] = {}
    made = []
    for language in ("python", "javascript"):
        wanted = {"language": language, "cwd": "/tmp"}
        status, context = timed(f"{language} context", lambda: ask("POST", "/contexts", wanted))
        assert status == 200, context
        said[language] = [context["language"], context["cwd"]]
        made.append(context["id"])
    where = {"python": "import os; y = 5; os.getcwd()", "javascript": "var y = 6; process.cwd()"}
    for language, name in zip(where, made):
        said[language].append(Execution(where[language], context_id=name).text)
        said[language].append(Execution("y", context_id=name).text)
    said["listed"] = set(made) <= {context["id"] for context in ask("GET", "/contexts")[1]}
    said["apart"] = Execution("y").error["name"]
    said["both"] = ask("POST", "/execute", {"code": "1", "context_id": made[0], "language": "python"})[0]
    said["restarted"] = timed("python context restarted", lambda: ask("POST", f"/contexts/{made[0]}/restart"))[0]
    said["after"] = Execution("y", context_id=made[0]).error["name"]
    # A run that never ends does, when its context is removed.
    spinning = lines("while True: pass", context_id=made[0])
    next(spinning)
    said["removed"] = ask("DELETE", f"/contexts/{made[0]}")[0]
    said["ended"] = [line["type"] for line in spinning]
    said["gone"] = ask("POST", "/execute", {"code": "1", "context_id": made[0]})
    said["gone"][1].index(made[0])
    said["gone"] = said["gone"][0]
    ask("DELETE", f"/contexts/{made[1]}")


def interrupts():
    """A run whose client goes away is interrupted, and its context is there for the next one."""
    said = SAID["interrupts"] = {}
    for language, code in (("python", "while True: pass"), ("javascript", "while (true);")):
        asked = connection()
        asked.request("POST", "/execute", json.dumps({"code": code, "language": language}))
        asked.getresponse().readline()
        asked.close()
        after = timed(f"{language} after an interrupt", lambda: Execution("'still here'", language=language))
        said[language] = after.text


def main():
    SAID["health"] = timed("health", lambda: ask("GET", "/health"))[0]
    for act in (python, javascript, streams, contexts, interrupts):
        act()
    SAID["language"] = ask("POST", "/execute", {"code": "1", "language": "cobol"})
    SAID["nonsense"] = ask("POST", "/execute", {"code": 1})[0]
    SAID["nowhere"] = ask("GET", "/nowhere")[0]
    print(json.dumps(SAID))


main()
