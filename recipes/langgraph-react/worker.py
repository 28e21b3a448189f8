"""Warm worker: a ReAct agent on langgraph that has made its first decision and not carried it out. The protocol is in
/forkd/workers/forkd_worker.py, the agent in /opt/forkd/react.py."""

import os
import sys

sys.path[:0] = ["/forkd/workers", "/opt/forkd"]

import react
import forkd_worker
import uuid_utils

QUESTION = "What is special about 1729?"


@forkd_worker.on_copy
def reseed(seed, env):
    """langchain's numbers of runs and messages come from a generator of its own, which the kernel seeds."""
    uuid_utils.reseed_rng()


if __name__ == "__main__":
    for tool in react.TOOLS:
        # What a copy does first. It is forgotten with the next question.
        react.ask("What is special about 12?", tool.name)
        react.take("roman")
    react.ask(QUESTION)
    names = {name: getattr(react, name) for name in ("agent", "ask", "messages", "take", "waiting")}
    forkd_worker.serve({"os": os, **names})
