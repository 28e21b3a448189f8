"""A client of the kernel, before the snapshot: it does what people's clients do first, so that no copy is the first."""

import json
import queue
import sys
import time

from jupyter_client.blocking import BlockingKernelClient

# Seconds until a question is asked again.
AGAIN = 20
CELLS = [
    "1 + 1",
    "print('rehearsed')",
    "import numpy as np, pandas as pd, scipy, matplotlib.pyplot as plt\npd.DataFrame({'a': np.arange(3)})",
    "fig, ax = plt.subplots(); _ = ax.plot(np.random.rand(10))",
    "plt.plot([1, 2, 3])\nplt.show()",
    "1 / 0",
    "await __import__('asyncio').sleep(0.01)",
]


def connect(connection, limit):
    """A client of a kernel that may still be starting, and slow: without the heartbeat's impatience. It asks again, because
    a kernel that ends may have taken the question along, and because nothing is published to a client before its
    subscription has arrived."""
    client = BlockingKernelClient()
    client.load_connection_info(connection)
    client.start_channels(hb=False)
    end = time.monotonic() + limit
    while True:
        try:
            client.kernel_info(reply=True, timeout=AGAIN)
            client.get_iopub_msg(timeout=AGAIN)
            return client
        except (TimeoutError, queue.Empty):
            if time.monotonic() > end:
                raise


def wait_for_heartbeat(client, limit):
    """As people's clients do it, who take a kernel for dead that is silent for a second: then they try again."""
    end = time.monotonic() + limit
    while True:
        try:
            return client.wait_for_ready(timeout=limit)
        except RuntimeError:
            if time.monotonic() > end:
                raise


def run(connection, limit):
    """Ends with an exception when the kernel does not answer as it should."""
    started = time.monotonic()

    def say(what):
        print(f"rehearsal: {what} after {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)

    restart = connection.pop("restart")
    client = connect(connection, limit)
    say("the kernel answers")
    if restart:
        client.shutdown(restart=True, reply=True, timeout=limit)
        say("the kernel says that it ends")
        client.stop_channels()
        connect(connection, limit).stop_channels()
        return
    for code in CELLS:
        shown = []
        reply = client.execute_interactive(code, timeout=limit, output_hook=shown.append, stop_on_error=False)
        say(json.dumps([code, reply["content"]["status"], [message["msg_type"] for message in shown]]))
        if reply["content"]["status"] == "error" and code != "1 / 0":
            sys.exit(f"{code}: {reply['content']['evalue']}")
    client.complete("np.ze", reply=True, timeout=limit)
    client.inspect("np.zeros", reply=True, timeout=limit)
    say("completion and inspection")
    spin = client.execute("print('spinning', flush=True)\nwhile True: pass", stop_on_error=False)
    while client.get_iopub_msg(timeout=limit)["msg_type"] != "stream":
        pass
    # The interrupt is the loop's, not that of what was printed.
    time.sleep(2)
    client.control_channel.send(client.session.msg("interrupt_request", {}))
    while client.get_shell_msg(timeout=limit)["parent_header"].get("msg_id") != spin:
        pass
    say("interrupted")
    client.start_channels(shell=False, iopub=False, stdin=False, control=False)
    wait_for_heartbeat(client, limit)
    say("the heart beats")
    client.stop_channels()
