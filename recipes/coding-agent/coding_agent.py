"""What an agent that writes code does over and over, without the start of a program each time: pytest and pip, each run in
a fork of a Python that has imported them. So what one run imports or breaks is gone with it, and the next one sees the
files as they are then."""

import contextlib
import functools
import hashlib
import http.server
import importlib
import io
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
import unittest.mock  # noqa: F401, most tests import it
import zipfile

import pytest
from pip._internal.cli.main import main as pip_main
from pip._internal.commands import install, uninstall  # noqa: F401, pip imports them when they are asked for


def in_fork(work):
    """Runs `work(report)` in a child process. What it prints is printed here when it has ended. Returns its exit code, and
    what it gave to `report`, if anything."""
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile("w+") as reported:
        child = os.fork()
        if child == 0:
            _become(work, printed, reported)
        try:
            _, status = os.waitpid(child, 0)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        finally:
            printed.seek(0)
            print(printed.read().decode(errors="replace"), end="")
        reported.seek(0)
        said = reported.read()
    return os.waitstatus_to_exitcode(status), json.loads(said) if said else None


def _become(work, printed, reported):
    """The child's part."""
    code = 70
    try:
        for stream in (1, 2):
            os.dup2(printed.fileno(), stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        code = work(lambda value: json.dump(value, reported))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
            reported.flush()
        os._exit(int(code))


class _Results:
    """A plugin of pytest that counts."""

    def __init__(self):
        self.passed, self.failed = 0, []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed += 1


def _test(folder, arguments, results):
    os.chdir(folder)
    # As `python3 -m` has it, so that tests import what lies beside them.
    sys.path.insert(0, "")
    # Packages may have been installed since.
    importlib.invalidate_caches()
    return int(pytest.main(list(arguments), plugins=[results]))


def test(folder=".", *arguments):
    """Runs pytest in a folder, as `cd FOLDER && python3 -m pytest ARGUMENTS` does. What pytest says is printed."""

    def work(report):
        results = _Results()
        code = _test(folder, arguments, results)
        report(vars(results))
        return code

    code, results = in_fork(work)
    return {"exit": code, **(results or {"passed": 0, "failed": []})}


def pip(*arguments):
    """Runs pip: `pip("install", "NAME")`. What it says is printed. Returns its exit code."""
    return in_fork(lambda _: pip_main(list(arguments)))[0]


# What is tested and installed once before the snapshot.
_MODULE = "WORD = 'learnt'\n"
_TESTS = """\
import unittest

import rehearsal


def test_word():
    assert rehearsal.WORD == 'learnt'


class Other(unittest.TestCase):
    def test_word(self):
        self.assertEqual(rehearsal.WORD, 'forgotten')
"""


def rehearse():
    """Tests and installs a package, so that all that this takes is imported. Where KVM emulates the guest's kernel this
    takes a minute, so nothing is done twice."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in [("rehearsal.py", _MODULE), ("test_rehearsal.py", _TESTS)]:
            with open(os.path.join(folder, name), "w") as file:
                file.write(text)
        # Here and in no fork, as what that imports is gone with it.
        place, path, results = os.getcwd(), sys.path[:], _Results()
        code = _test(folder, ["-q"], results)
        os.chdir(place)
        sys.path[:] = path
        for name in ("rehearsal", "test_rehearsal"):
            del sys.modules[name]
        if (code, results.passed, results.failed) != (1, 1, ["test_rehearsal.py::Other::test_word"]):
            sys.exit(f"pytest says something else of a test that passes and one that fails: {vars(results)}")
        with _index(folder) as url:
            _learn(lambda: pip_main(["install", "-q", "--index-url", url, "rehearsal"]))
        if pip("uninstall", "-qy", "rehearsal"):
            sys.exit("pip cannot remove what it has installed")


def _learn(work):
    """Runs `work` in a fork and imports here what it has imported there. pip, once it has installed something, warns of
    each import for the rest of a process."""

    def child(report):
        code = work()
        report([name for name in sys.modules if "rehearsal" not in name])
        return code

    code, names = in_fork(child)
    if code:
        sys.exit(f"a rehearsal ended with {code}")
    for name in names:
        # Some have another name in sys.modules than in their files.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *arguments):
        pass


@contextlib.contextmanager
def _index(folder):
    """Serves a package index at the loopback."""
    info = "rehearsal-1.0.dist-info"
    files = {
        "rehearsal.py": _MODULE,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: rehearsal\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: forkd\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [*files, f"{info}/RECORD"]
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in record)
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    place = os.path.join(folder, "rehearsal")
    os.mkdir(place)
    with open(os.path.join(place, "rehearsal-1.0-py3-none-any.whl"), "wb") as file:
        file.write(wheel.getvalue())
    digest = hashlib.sha256(wheel.getvalue()).hexdigest()
    with open(os.path.join(place, "index.html"), "w") as file:
        name = "rehearsal-1.0-py3-none-any.whl"
        file.write(f'<!DOCTYPE html><html><body><a href="{name}#sha256={digest}">{name}</a></body></html>')
    handler = functools.partial(_Quiet, directory=folder)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
