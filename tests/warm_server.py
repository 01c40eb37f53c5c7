"""A process that has imported torch, DeepSpeed and ChatGoT and forks what would be `python PROGRAM`: imports are nine
tenths of a small rank's time.

tests.support.warm_python starts it. Its clients, warm_client.py, are what a test or a launcher starts in place of
Python; each sends the words of its program, its environment, folder and standard streams and which signals it blocks or
ignores, and passes signals on. A program is a process of its own as ever, nothing of torch has run before it is forked,
and it ends as a Python process does. It is killed when its client is gone; what it starts itself with sys.executable is
forked as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import deepspeed.module_inject.auto_ep_layer  # here and below: so that the programs need not import it
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import numpy as np
import torch
import torch._dynamo  # every optimizer imports it
import torch._inductor.compile_fx  # noqa: F401 - and every ZeRO engine, for Muon
import yaml  # noqa: F401

import chatgot.cli
import chatgot.launcher
import chatgot.tuning.probe  # noqa: F401
from chatgot.training import run  # noqa: F401
from chatgot.version import code_hash

PR_SET_PDEATHSIG = 1
COLD = "CHATGOT_TEST_COLD"
"""A variable with which a program starts others with Python itself, for ranks that look at their parent."""
LARGEST = 1 << 20
"""Bytes of a request: an environment and a command line."""


def enter(request: dict[str, Any], streams: list[int], executable: str) -> list[str]:
    """Make the forked process what `python *program` would be with this environment, folder and streams.

    Returns the program.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    if not request["environment"].pop(COLD, ""):
        sys.executable = executable
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.orig_argv = [sys.executable, *request["program"]]
    random.seed()
    np.random.seed()
    return request["program"]


def become(program: list[str]) -> None:
    """Run `python *program` in this process."""
    program = program[program[0] == "-u" :]
    if program[0] == "-c":
        sys.argv = ["-c", *program[2:]]
        sys.path[0] = ""
        exec(compile(program[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path[0] = os.path.dirname(program[0])
        runpy.run_path(program[0], run_name="__main__")


def serve(folder: Path) -> list[str]:
    """Write `folder / "python"`, which asks for a program; fork what is asked for, and tell each the end of its own.

    Returns in a forked process, with its program; ends when stdin is closed, and its programs with it.
    """
    ended, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    door = socket.socket(socket.AF_UNIX)
    door.bind(str(folder / "socket"))
    door.listen()
    running: dict[int, socket.socket] = {}
    code_hash()  # kept: every start of training asks for it
    gc.collect()
    gc.freeze()  # the modules: programs neither search nor, by that, copy them
    unfinished, python = folder / "unfinished", folder / "python"
    client = f'exec {sys.executable} -I -S {Path(__file__).with_name("warm_client.py")} {folder / "socket"} "$@"'
    unfinished.write_text(f"#!/bin/sh\n{client}\n")
    unfinished.chmod(0o755)
    unfinished.rename(python)
    while True:
        ready = select.select([0, door, ended, *running.values()], [], [])[0]
        if 0 in ready:  # whoever started this is gone
            os._exit(0)
        for pid, client in running.items():
            if client in ready:
                os.kill(pid, int.from_bytes(client.recv(1), "big") or signal.SIGKILL)  # none: the client is gone
        if ended in ready:
            os.read(ended, 4096)
            while running and (found := os.waitpid(-1, os.WNOHANG))[0]:
                with running.pop(found[0]) as client, contextlib.suppress(BrokenPipeError):
                    client.send(str(os.waitstatus_to_exitcode(found[1])).encode())
        if door in ready:
            client = door.accept()[0]
            text, streams, *_ = socket.recv_fds(client, LARGEST, 3)
            while text and not text.endswith(b"\n"):
                more = client.recv(LARGEST)
                text = text + more if more else b""
            if not text:  # killed before it had asked
                continue
            pid = os.fork()
            if pid == 0:
                for other in (door, client, *running.values()):
                    other.close()
                os.close(ended)
                os.close(wake)
                return enter(json.loads(text), streams, str(python))
            for stream in streams:
                os.close(stream)
            running[pid] = client


if __name__ == "__main__":
    become(serve(Path(sys.argv[1])))
