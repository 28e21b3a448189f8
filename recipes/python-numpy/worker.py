"""Warm worker: Python with numpy imported. The protocol is in /forkd/workers/forkd_worker.py."""

import sys

sys.path.insert(0, "/forkd/workers")

import forkd_worker
import numpy


@forkd_worker.on_copy
def reseed(seed, env):
    """numpy's legacy generator takes 32-bit words."""
    numpy.random.seed([int.from_bytes(seed[i : i + 4], "little") for i in range(0, len(seed), 4)])


if __name__ == "__main__":
    forkd_worker.serve({"numpy": numpy, "np": numpy}, rehearse=["numpy.random.rand()"])
