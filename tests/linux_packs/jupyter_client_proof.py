"""What a user of jupyter_client does with a kernel: jupyter_client_proof.py CONNECTION_FILE SIBLINGS_CONNECTION_FILE.
Prints what came of it as one JSON document."""

import base64
import json
import struct
import sys
import time
import zlib
from queue import Empty

from jupyter_client.blocking import BlockingKernelClient

# Seconds; KVM may emulate the guest's kernel, and much else may run.
LIMIT = 600
SAID = {"seconds": {}}
# With `stop_on_error`, what is asked right behind an error may still be refused for it.
MORE = {"allow_stdin": False, "stop_on_error": False}
# Without the cut to what is drawn, which the inline backend makes otherwise: the size is to be known.
PLOT = """%config InlineBackend.print_figure_kwargs = {'bbox_inches': None}
import matplotlib.pyplot as plt
figure, axes = plt.subplots(figsize=(3, 2), dpi=100, facecolor='red')
axes.plot(np.random.rand(100))
plt.show()"""


def connect(connection):
    """A client that is patient: `wait_for_ready` takes a kernel for dead that is silent for a second. It asks again,
    because a kernel that ends may have taken the question along."""
    client = BlockingKernelClient()
    client.load_connection_info(connection)
    client.start_channels(hb=False)
    end = time.monotonic() + LIMIT
    while True:
        try:
            client.kernel_info(reply=True, timeout=10)
            # Nothing is published to a client before its subscription has arrived.
            client.get_iopub_msg(timeout=10)
            return client
        except (TimeoutError, Empty):
            if time.monotonic() > end:
                raise


def heart_beats(client):
    """Whether the kernel's heart is heard, after a first second in which it is taken for granted."""
    client.start_channels(shell=False, iopub=False, stdin=False, control=False)
    end = time.monotonic() + LIMIT
    time.sleep(1.5)
    while not client.is_alive() and time.monotonic() < end:
        time.sleep(0.1)
    return client.is_alive()


class Step:
    """Measures what is done."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        self.started = time.monotonic()

    def __exit__(self, *_):
        SAID["seconds"][self.name] = round(time.monotonic() - self.started, 3)


def run(client, code):
    """The reply, what was shown, and the messages."""
    shown = []
    reply = client.execute_interactive(code, timeout=LIMIT, output_hook=shown.append, **MORE)
    return reply, {message["msg_type"]: message["content"] for message in shown}, shown


def value(client, code):
    reply, shown, _ = run(client, code)
    assert reply["content"]["status"] == "ok", reply["content"]
    return shown["execute_result"]["data"]["text/plain"]


def picture(data):
    """Size of a PNG picture, and its first pixel."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed = 8, b""
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            assert (depth, colour) == (8, 6)
        elif kind == b"IDAT":
            packed += body
        at += length + 12
    # Behind the byte that says how a row was filtered; the first pixel has nothing beside it to filter with.
    rows = zlib.decompress(packed)
    assert len(rows) == height * (width * 4 + 1)
    return {"width": width, "height": height, "corner": rows[1:5].hex()}


def main(connection, sibling):
    with Step("connect"):
        client = connect(connection)
    SAID["heart_beats"] = heart_beats(client)
    with Step("kernel_info"):
        info = client.kernel_info(reply=True, timeout=LIMIT)
    SAID["implementation"] = info["content"]["implementation"]
    SAID["key"] = connection["key"]
    SAID["session"] = info["header"]["session"]
    SAID["message"] = info["header"]["msg_id"]

    names = "('numpy', 'scipy.stats', 'scipy.optimize', 'pandas', 'matplotlib.pyplot')"
    SAID["imported"] = value(client, f"import sys; [name for name in {names} if name not in sys.modules]")
    with Step("numpy, pandas, scipy"):
        code = "import numpy as np, pandas as pd, scipy.linalg\n"
        code += "float(pd.Series(scipy.linalg.solve(np.eye(3), np.arange(1, 4))).sum())"
        SAID["sum"] = value(client, code)
    SAID["printed"] = run(client, "print('here')")[1]["stream"]["text"]
    with Step("plot"):
        _, shown, _ = run(client, PLOT)
    SAID["plot"] = picture(base64.b64decode(shown["display_data"]["data"]["image/png"]))
    SAID["error"] = run(client, "1 / 0")[0]["content"]["ename"]
    SAID["numpy"] = value(client, "np.random.rand()")
    SAID["random"] = value(client, "import random; random.random()")
    SAID["uuid"] = value(client, "import uuid; uuid.uuid4()")

    spinning = client.execute("kept = 'still here'\nprint('spinning', flush=True)\nwhile True: pass", **MORE)
    while client.get_iopub_msg(timeout=LIMIT)["msg_type"] != "stream":
        pass
    # The interrupt is the loop's, not that of what was printed.
    time.sleep(2)
    with Step("interrupt"):
        client.control_channel.send(client.session.msg("interrupt_request", {}))
        reply = client.get_shell_msg(timeout=LIMIT)
        while reply["parent_header"]["msg_id"] != spinning:
            reply = client.get_shell_msg(timeout=LIMIT)
    SAID["interrupted"] = reply["content"]["ename"]
    SAID["after_interrupt"] = value(client, "kept")

    # The sibling's key at this kernel's ports: it is not heard.
    stranger = BlockingKernelClient()
    with open(sibling) as file:
        stranger.load_connection_info({**connection, "key": json.load(file)["key"]})
    stranger.start_channels()
    asked = stranger.kernel_info()
    try:
        SAID["other_key_is_answered"] = stranger.get_shell_msg(timeout=10)["parent_header"]["msg_id"] == asked
    except Empty:
        SAID["other_key_is_answered"] = False
    stranger.stop_channels()

    with Step("restart"):
        client.shutdown(restart=True, reply=True, timeout=LIMIT)
        client.stop_channels()
        client = connect(connection)
    reply, shown, _ = run(client, "import sys; ('kept' in globals(), 'pandas' in sys.modules)")
    SAID["after_restart"] = shown["execute_result"]["data"]["text/plain"]
    SAID["count_after_restart"] = reply["content"]["execution_count"]
    SAID["session_after_restart"] = reply["header"]["session"]
    SAID["numpy_after_restart"] = value(client, "np.random.rand()")
    value(client, "kept = 'since the restart'; kept")
    client.stop_channels()
    print(json.dumps(SAID))


with open(sys.argv[1]) as file:
    main(json.load(file), sys.argv[2])
