"""Warm worker of the tests' machine: Python with nothing imported. The protocol is in /forkd/workers/forkd_worker.py."""

import sys

sys.path.insert(0, "/forkd/workers")

import forkd_worker

forkd_worker.serve()
