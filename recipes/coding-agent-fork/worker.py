"""Warm worker in /tmp/workspace: that of coding-agent, and `digest`."""

import ctypes
import hashlib
import os
import sys

sys.path[:0] = ["/forkd/workers", "/opt/forkd"]

import coding_agent
import forkd_worker

DISK, WORKSPACE = "/opt/workspace", "/tmp/workspace"
# Of mount(2).
MS_BIND = 4096


def digest(folder=WORKSPACE):
    """The sha256 of all files below a folder: of their names and their contents, in the order of the names."""
    whole = hashlib.sha256()
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(place, name)
            with open(path, "rb") as file:
                contents = hashlib.file_digest(file, "sha256").hexdigest()
            whole.update(f"{contents}  {os.path.relpath(path, folder)}\n".encode())
    return whole.hexdigest()


if __name__ == "__main__":
    # /tmp is empty when a machine boots; the workspace is on its disk, which copies share.
    os.mkdir(WORKSPACE)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(DISK.encode(), WORKSPACE.encode(), None, ctypes.c_ulong(MS_BIND), None):
        raise OSError(ctypes.get_errno(), "cannot bind the workspace", WORKSPACE)
    os.chdir(WORKSPACE)
    coding_agent.rehearse()
    forkd_worker.serve({"test": coding_agent.test, "pip": coding_agent.pip, "digest": digest})
