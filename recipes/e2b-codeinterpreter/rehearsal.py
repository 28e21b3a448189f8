"""A client of the code interpreter, before the snapshot: it does what people's clients do first."""

import json
import sys
from http.client import HTTPConnection

CELLS = {
    "python": [
        "1 + 1",
        "print('rehearsed')",
        "import numpy as np, pandas as pd, matplotlib.pyplot as plt\npd.DataFrame({'a': np.arange(3)})",
        "plt.plot([1, 2, 3]); plt.title('rehearsed'); plt.show()",
        "1 / 0",
        "while True: pass",
    ],
    "javascript": [
        "1 + 1",
        "console.log('rehearsed')",
        "import 'path'; ({ name: require('path').join('a', 'b') })",
        "throw new TypeError('rehearsed')",
        "while (true);",
    ],
    "typescript": ["{ const a: number = 1; a }"],
}
# Ends by an interrupt, when its client goes away.
ENDLESS = ("while True: pass", "while (true);")


def run(contexts, port):
    """Ends with an exception when something is not answered. What the cells did is forgotten."""
    for language, cells in CELLS.items():
        for code in cells:
            connection = HTTPConnection("127.0.0.1", port)
            body = json.dumps({"code": code, "language": language})
            connection.request("POST", "/execute", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                sys.exit(f"{code}: {answer.status} {answer.read()}")
            if code in ENDLESS:
                answer.readline()
                answer.close()
                connection.close()
                continue
            kinds = [json.loads(line)["type"] for line in answer.read().splitlines()]
            print(f"rehearsal: {json.dumps([code, kinds])}", file=sys.stderr, flush=True)
            connection.close()
    # A context that was made and removed, and then what the cells left behind.
    connection = HTTPConnection("127.0.0.1", port)
    for method, path in (("POST", "/contexts"), ("GET", "/contexts"), ("GET", "/health")):
        connection.request(method, path, "{}" if method == "POST" else None)
        answer = connection.getresponse().read()
        if method == "POST":
            made = json.loads(answer)["id"]
    connection.request("DELETE", f"/contexts/{made}")
    connection.getresponse().read()
    connection.close()
    for context in list(contexts.by_id.values()):
        with context.turn:
            context.forget()
