"""A process that has imported torch and DeepSpeed and forks ranks: imports are nine tenths of a small rank's time.

tests.support.run_ranks starts one per test process and writes a line of JSON per launch to its stdin. A rank is a
process of its own as ever, with its own arguments, environment, output files and process group; nothing of torch
has run before it is forked, and it ends as a Python process does.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import runpy
import select
import signal
import sys
import time
from typing import Any

import deepspeed  # noqa: F401 - here and below: so that the ranks need not import it
import numpy as np
import torch
import torch._dynamo  # every optimizer imports it
import torch._inductor.compile_fx  # noqa: F401 - and every ZeRO engine, for Muon

PR_SET_PDEATHSIG = 1


def enter(rank: dict[str, Any]) -> list[str]:
    """Make the forked process what `python *program` would be with this environment and these output files.

    Returns the program.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number, path in ((1, rank["stdout"]), (2, rank["stderr"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.environ.clear()
    os.environ.update(rank["environment"])
    random.seed()
    np.random.seed()
    return rank["program"]


def become(program: list[str]) -> None:
    """Run `python *program` in this process."""
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path[0] = os.path.dirname(program[0])
        runpy.run_path(program[0], run_name="__main__")


def serve() -> list[str]:
    """Fork the ranks of every request and answer with their exit codes (null: killed at the deadline).

    Returns in a rank, with its program; ends when stdin is closed, and its ranks with it.
    """
    answers = os.dup(1)
    gc.collect()
    gc.freeze()  # the modules: ranks neither search nor, by that, copy them
    while line := sys.stdin.readline():
        request = json.loads(line)
        ranks = request["ranks"]
        running: dict[int, int] = {}
        for index, rank in enumerate(ranks):
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                os.close(answers)
                return enter(rank)
            running[pid] = index
        codes: list[int | None] = [None] * len(ranks)
        deadline = time.monotonic() + request["timeout"]
        late = False
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in running:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline and not late:
                late = True
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
            elif select.select([0], [], [], 0.01)[0]:  # whoever asked is gone
                os._exit(1)
        os.write(answers, (json.dumps({"codes": codes, "late": late}) + "\n").encode())
    os._exit(0)


if __name__ == "__main__":
    become(serve())
