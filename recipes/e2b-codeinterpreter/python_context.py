"""A Python context: IPython in a process that was forked off one with everything imported, without Jupyter's sockets and
threads. Requests come as lines of JSON; what a run gives goes back as lines of the code interpreter's interface, up to
`end_of_execution`. What is printed goes to descriptors 1 and 2, that of programs which the code starts too."""

import base64
import json
import os
import signal
import sys
import traceback

import charts
import scientific
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

# The interface's names for what a result may be.
KEYS = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "text/latex": "latex",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "application/json": "json",
    "application/javascript": "javascript",
    charts.DATA: "data",
    charts.CHART: "chart",
}


def result(data, main):
    """A result's line."""
    line = {"type": "result", "is_main_result": main}
    extra = {}
    for kind, value in data.items():
        if isinstance(value, bytes):
            value = base64.b64encode(value).decode()
        elif isinstance(value, str) and kind in ("image/png", "image/jpeg", "application/pdf"):
            value = value.replace("\n", "")
        if kind in KEYS:
            line[KEYS[kind]] = value
        else:
            extra[kind] = value
    text = line.get("text")
    # A string is shown as it is, not as Python writes it: the interface has it so.
    if main and text and len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        line["text"] = text[1:-1]
    if extra:
        line["extra"] = extra
    return line


class Display(DisplayPublisher):
    """What `display` shows."""

    def publish(self, data, metadata=None, **more):
        sys.stdout.flush()
        self.shell.send(result(data, False))

    def clear_output(self, wait=False):
        pass


class LastValue(DisplayHook):
    """The value of the last expression."""

    def write_output_prompt(self):
        pass

    def write_format_data(self, format_dict, md_dict=None):
        sys.stdout.flush()
        self.shell.send(result(format_dict, True))

    def finish_displayhook(self):
        self._is_active = False


class Shell(InteractiveShell):
    """IPython whose results and errors are lines."""

    display_pub_class = Display
    displayhook_class = LastValue
    channel = None

    def send(self, line):
        self.channel.sendall(json.dumps(line, default=str).encode() + b"\n")

    def _showtraceback(self, etype, evalue, stb):
        sys.stdout.flush()
        self.send({"type": "error", "name": etype.__name__, "value": str(evalue), "traceback": "\n".join(stb)})

    def enable_gui(self, gui=None):
        pass

    def ask_exit(self):
        pass


def prepare():
    """In the process that is forked: a shell costs more to make than to fork."""
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    shell = Shell.instance(config=config)
    shell.enable_matplotlib("inline")
    charts.register(shell.display_formatter)
    shell.push(scientific.NAMES, interactive=False)


class Context:
    """One process's side of its channel."""

    def __init__(self, channel):
        self.shell = Shell.instance()
        self.shell.channel = channel

    def run(self, request):
        changed = {name: os.environ.get(name) for name in request["env_vars"]}
        os.environ.update(request["env_vars"])
        self.shell.send({"type": "number_of_executions", "execution_count": self.shell.execution_count})
        try:
            # Here, so that an interrupt at any moment is this code's.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.shell.run_cell(request["code"], store_history=True)
        except BaseException as error:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            # Not the code's own errors, which the shell shows: an interrupt outside of it.
            stack = traceback.format_exc()
            self.shell.send({"type": "error", "name": type(error).__name__, "value": str(error), "traceback": stack})
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        for name, value in changed.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        sys.stdout.flush()
        sys.stderr.flush()
        self.shell.send({"type": "end_of_execution"})

    def become(self, request):
        os.environ.update(request["env"])
        scientific.reseed()
        self.shell.send({"type": "end_of_execution"})

    def forget(self, request):
        """After the rehearsal."""
        self.shell.reset(new_session=True)
        self.shell.push(scientific.NAMES, interactive=False)
        self.shell.send({"type": "end_of_execution"})


def run(channel, output, errors):
    """What a forked process does."""
    os.setpgid(0, 0)
    for number, descriptor in ((1, output), (2, errors)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, encoding="utf-8", closefd=False)
    context = Context(channel)
    operations = {"run": context.run, "become": context.become, "forget": context.forget}
    for line in channel.makefile("rb"):
        request = json.loads(line)
        if "cwd" in request:
            os.chdir(request["cwd"])
        operations[request["op"]](request)
