"""Serves a real package with a bug: coding_agent.py WHEELS SERVED

Fetches what coding_agent.txt pins into WHEELS, unless it is there. Below SERVED it makes `repositories/transaction.git`,
which has the package, and an index of what the package needs in `www/simple`.
"""

import hashlib
import pathlib
import shutil
import subprocess
import sys
import zipfile

HERE = pathlib.Path(__file__).parent
# An element is known by its id.
GOOD, BAD = "        del self.data[id(obj)]\n", "        del self.data[obj]\n"


def fetch(wheels):
    if len(list(wheels.glob("*.whl"))) == 2:
        return
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--python-version=3.11", "--implementation=cp"]
    command += ["--abi=cp311", "--abi=none", "--platform=manylinux_2_17_x86_64", f"--dest={wheels}"]
    subprocess.run([*command, f"--requirement={HERE / 'coding_agent.txt'}"], check=True)


def repository(wheel, served):
    tree = served / "transaction"
    tree.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree, [name for name in archive.namelist() if name.startswith("transaction/")])
    source = tree / "transaction" / "weakset.py"
    text = source.read_text()
    assert text.count(GOOD) == 1
    source.write_text(text.replace(GOOD, BAD))
    (tree / "requirements.txt").write_text("zope.interface\n")

    def git(*arguments):
        who = ["-c", "user.name=Test", "-c", "user.email=test@www.test"]
        subprocess.run(["git", *who, "-C", str(tree), *arguments], check=True)

    git("init", "--quiet", "--initial-branch=main")
    git("add", ".")
    git("commit", "--quiet", "--message=Begin")
    git("clone", "--quiet", "--bare", ".", str(served / "repositories" / "transaction.git"))


def index(wheel, served):
    folder = served / "www" / "simple" / "zope-interface"
    folder.mkdir()
    shutil.copy(wheel, folder)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    link = f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a>'
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{link}</body></html>\n")


wheels, served = (pathlib.Path(argument).resolve() for argument in sys.argv[1:])
fetch(wheels)
repository(next(wheels.glob("transaction-*.whl")), served)
index(next(wheels.glob("zope_interface-*.whl")), served)
