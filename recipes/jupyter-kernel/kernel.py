"""ipykernel in a process that was forked: everything is imported, and what starts is sockets, threads and a shell. It
starts at ports that are free, and listens at those of the connection file when it is its turn."""

import asyncio
import importlib
import json
import os
import time
import uuid
from concurrent.futures import Future

import forkd_worker
import scientific
import zmq
from ipykernel.heartbeat import Heartbeat
from ipykernel.kernelapp import IPKernelApp
from traitlets.config import Config

ADDRESS = "127.0.0.1"
# Seconds.
LAST_ANSWERS = 0.5
CHANNELS = ("shell", "iopub", "stdin", "control", "hb")

# What a kernel imports only when it starts, or when it is used.
for name in (
    "IPython.core.completerlib",
    "IPython.core.debugger",
    "IPython.core.guarded_eval",
    "IPython.core.latex_symbols",
    "IPython.core.magics.ast_mod",
    "IPython.core.magics.execution",
    "IPython.extensions.storemagic",
    "executing",
    "ipykernel.debugger",
    "jedi",
    "matplotlib_inline.backend_inline",
    "psutil",
    "pydoc_data.topics",
    "pygments.formatters.html",
    "pygments.formatters.terminal256",
    "pygments.lexers.python",
    "stack_data",
    "tornado.platform.asyncio",
):
    importlib.import_module(name)


class Application(IPKernelApp):
    """ipykernel's own, without what it says to somebody who started it at a terminal."""

    def log_connection_info(self):
        self._ports = {name: getattr(self, f"{name}_port") for name in CHANNELS}

    def write_connection_file(self, **more):
        """The worker writes it, in each copy."""


class Kernel:
    """The application, and the worker's requests, which come as lines of JSON between the cells."""

    def __init__(self, channel, first):
        config = Config()
        config.HistoryManager.enabled = False
        config.Application.log_level = "ERROR"
        config.Session.key = first["key"].encode()
        self.application = Application.instance(config=config)
        self.application.initialize([])
        self.kernel = self.application.kernel
        self.shell = self.kernel.shell
        # The backend was imported before there was a shell that it could tell to show figures behind each cell.
        self.shell.enable_matplotlib("inline")
        self.forget()
        self.become(first)
        self.kernel.debugpy_stream = None
        self.kernel.start()
        self.loop = self.kernel.io_loop
        # What is awaited in an eval runs where the cells' tasks do.
        forkd_worker.loop = self.loop.asyncio_loop
        self.channel = channel
        self.lines = channel.makefile("rwb", buffering=0)
        self.asked = False

    def forget(self):
        """As if nothing had run."""
        self.shell.reset(new_session=True)
        self.shell.push(scientific.NAMES, interactive=False)

    def become(self, request):
        """Takes on what makes this kernel another than those of other copies."""
        os.environ.update(request["env"])
        scientific.reseed()
        session = self.kernel.session
        session.key = request["key"].encode()
        session.session = str(uuid.uuid4())
        self.kernel.ident = str(uuid.uuid4())
        self.shell.displayhook.topic = self.kernel._topic("execute_result")

    def listen(self, ports):
        """At these ports, too. Each socket belongs to a thread."""
        application = self.application
        owners = (
            ("shell", application.shell_channel_thread.io_loop, application.shell_socket),
            ("iopub", application.iopub_thread.io_loop, application.iopub_thread.socket),
            ("control", application.control_thread.io_loop, application.control_socket),
        )
        for name, loop, socket in owners:
            in_thread_of(loop, socket.bind, address(ports[f"{name}_port"])).result()
        # Not of the control channel: with its address its connections end, and the answer to the request to shut down has
        # not gone out when this is asked.
        self.unbound_first = [(loop, socket, address(ports[f"{name}_port"])) for name, loop, socket in owners[:2]]
        application.stdin_socket.bind(address(ports["stdin_port"]))
        # The one that there is waits in the library, and cannot be told.
        Heartbeat(zmq.Context(), ("tcp", ADDRESS, ports["hb_port"])).start()
        self.kernel.do_shutdown = self.do_shutdown

    async def do_shutdown(self, restart):
        """Listens no more before it says that it ends: who hears that and connects is to reach the next kernel."""
        for loop, socket, at in self.unbound_first:
            await asyncio.wrap_future(in_thread_of(loop, socket.unbind, at))
        return type(self.kernel).do_shutdown(self.kernel, restart)

    def run(self):
        """Until a client asks it to shut down, or the worker is gone."""
        self.loop.add_handler(self.channel, self.on_request, self.loop.READ)
        self.reply({f"{name}_port": port for name, port in self.application._ports.items()})
        while True:
            self.asked = False
            self.loop.start()
            if not self.asked or not self.answer():
                break
        # The process ends with this. ipykernel's own way to close may wait for ever for sockets whose clients are gone; the
        # last answers only need a moment to go out.
        time.sleep(LAST_ANSWERS)

    def on_request(self, channel, events):
        # Outside of the loop, so that an eval may run it to await something.
        self.asked = True
        self.loop.stop()

    def answer(self):
        line = self.lines.readline()
        if not line:
            return False
        request = json.loads(line)
        if request["op"] == "become":
            self.become(request)
            self.reply({})
        elif request["op"] == "forget":
            self.forget()
            self.reply({})
        elif request["op"] == "listen":
            self.listen(request["ports"])
            self.reply({})
        else:
            self.reply(forkd_worker.answer(request["code"], self.shell.user_ns, self.evaluate))
        return True

    def evaluate(self, code, names):
        return forkd_worker.evaluate_python(self.shell.transform_cell(code), names)

    def reply(self, message):
        self.channel.sendall(json.dumps(message).encode() + b"\n")


def address(port):
    return f"tcp://{ADDRESS}:{port}"


def in_thread_of(loop, act, *arguments):
    """Has a loop's own thread do it; the result is there when that is done."""
    done = Future()

    def run():
        try:
            done.set_result(act(*arguments))
        except Exception as error:
            done.set_exception(error)

    loop.add_callback(run)
    return done


def run(channel):
    """What a forked process does: it waits for its first line, which says who it is."""
    os.setpgid(0, 0)
    line = channel.makefile("rb", buffering=0).readline()
    if line:
        Kernel(channel, json.loads(line)).run()
