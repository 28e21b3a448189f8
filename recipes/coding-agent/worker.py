"""Warm worker of an agent that writes code: Python with pytest and pip imported. The protocol is in
/forkd/workers/forkd_worker.py, what evaluated code may call in /opt/forkd/coding_agent.py."""

import sys

sys.path[:0] = ["/forkd/workers", "/opt/forkd"]

import coding_agent
import forkd_worker

if __name__ == "__main__":
    coding_agent.rehearse()
    forkd_worker.serve({"test": coding_agent.test, "pip": coding_agent.pip})
