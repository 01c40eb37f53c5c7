"""One wandb run per run folder, beside the journal. wandb can neither stop nor slow nor hang a training.

The training process never imports wandb: observe.wandb_worker does, in a process of its own that is waited for with a
bound and killed when the bound is over. Why not DeepSpeed's WandbMonitor: it sets no id, no resume and no mode, puts
samples on the step axis, and raises on rank 0 alone when there is no API key (deepspeed/monitor/wandb.py, 0.19.8).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chatgot.run_folder as run_folder
from chatgot.distributed import python_path
from chatgot.files import write_atomically
from chatgot.observe.wandb_worker import LAST_RECORD

if TYPE_CHECKING:
    from chatgot.deepspeed_json.resolve import WandbConfig

logger = logging.getLogger(__name__)
_MOST_UNSENT = 2 << 20
"""Bytes of records that wait until the process takes them."""
ARTIFACT_SECONDS = 1800.0
"""Granted to the upload at the end where artifacts were asked for."""
_ALERTS = {
    "rolled_back": "Rolled back",
    "spike": "The loss shot up",
    "save_refused": "The state is not finite",
    "failed": "The run has failed",
    "preempted": "Interrupted and saved",
    "out_of_memory": "Out of memory",
}
"""Events that wandb sends its users a message about."""
_SAID = ("step", "why", "error", "signal", "from_step", "to_step", "exit_code")
"""Fields of an event that the message has."""


class WandbRun:
    """Rank 0's wandb run, or nothing at all where wandb is disabled, missing or broken."""

    def __init__(
        self,
        config: WandbConfig,
        *,
        run_dir: Path,
        run_name: str,
        run_config: Mapping[str, Any],
        resumed_from_step: int | None = None,
        tags: Sequence[str] = (),
        init_timeout: float = 30.0,
        finish_timeout: float = 60.0,
    ) -> None:
        """Open or continue the run folder's wandb run. No fault of wandb, the network or the server is raised.

        Args:
            run_dir: keeps the id in wandb/run_id.json and what wandb has in wandb/last_record.json, with wandb's own
                files beside them. Steps that wandb has and that are trained again are not logged a second time; steps
                that a kill kept from it, and that are not trained again, are sent from metrics.jsonl.
            run_config: the resolved configuration, shown by wandb.
            resumed_from_step: the checkpoint's step; None for a new start.
            init_timeout: seconds granted to go online; then offline is granted as many, then wandb is off.
            finish_timeout: seconds granted to the upload at the end.
        """
        self._finish_timeout = finish_timeout
        self._worker: _Worker | None = None
        self.mode: str = "off"
        """online, offline, or off: nothing is sent anywhere."""
        if not config.enabled:
            return
        if os.environ.get("WANDB_MODE", "").lower() == "disabled":
            logger.info("wandb: off (WANDB_MODE=disabled)")
            return
        folder = run_dir / run_folder.WANDB
        try:
            name, known = _run_id(folder)
        except OSError as error:
            self._off(f"its id cannot be kept: {error}")
            return
        run = {"id": name, "dir": str(run_dir), "name": run_name, "config": dict(run_config), "tags": list(tags)}
        run |= {"project": config.project, "group": config.group, "entity": config.team}
        job = {
            "run": run,
            "resumed_from_step": resumed_from_step if known else None,
            "pid": os.getpid(),
            "init_timeout": init_timeout,
            "finish_timeout": finish_timeout,
        }
        failure: str | None = None
        for _ in ("online where that is possible", "offline because of the failure"):
            try:
                worker = _Worker({**job, "offline_because": failure}, folder)
                ready = worker.wait("ready", init_timeout)
            except (OSError, _WorkerError) as error:
                failure = str(error)
                if "No module named 'wandb'" in failure:
                    failure = "wandb is not installed (pip install wandb), and the JSON's wandb section asks for it"
                    break
                continue
            self._worker = worker
            because = ready["offline_because"]
            self.mode = "offline" if because else "online"
            what = f"run {name} goes on, {self.mode}" if known else f"new run {name} {self.mode}"
            more = f" ({because}); upload later: wandb sync {folder}/offline-run-*" if because else f": {ready['url']}"
            logger.info(f"wandb: {what}{more}")
            return
        self._off(str(failure))

    def log(self, metrics: Mapping[str, float | int | None], step: int) -> None:
        """Send a step's metrics. Never blocks. A step's calls are one record, sent when the next step comes."""
        self._tell({"step": step, "metrics": {name: value for name, value in metrics.items() if value is not None}})

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Send a table, e.g. of samples, as part of the step's record. Never blocks."""
        self._tell({"step": step, "tables": {name: {"columns": columns, "rows": rows}}})

    def summarize(self, **values: Any) -> None:
        """Set values of the run's summary. Never blocks."""
        self._tell({"summary": values})

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Tell wandb of an event: some are alerts, and what a resume has proved stands in the summary. Never blocks."""
        if title := _ALERTS.get(kind):
            text = "; ".join(f"{name}: {fields[name]}" for name in _SAID if name in fields)
            self._tell({"alert": {"title": title, "text": text, "level": "WARN" if kind == "preempted" else "ERROR"}})
        elif kind == "resume_verified":
            self.summarize(verified=f"{fields['steps']}/{fields['of']} ({fields['compares']})")
        elif kind == "resume_differs":
            self.summarize(verified=f"differs at step {fields['step']}")

    def finish(self, exit_code: int, artifacts: Mapping[str, Path] | None = None) -> None:
        """Send what is left, close the run, and wait for it no longer than `finish_timeout`, or ARTIFACT_SECONDS where
        there are artifacts: files and folders by their kind. Idempotent.
        """
        worker, self._worker = self._worker, None
        if worker is None:
            return
        self.mode = "off"
        try:
            seconds = ARTIFACT_SECONDS if artifacts else self._finish_timeout
            for kind, path in (artifacts or {}).items():
                worker.send({"artifact": {"kind": kind, "path": str(path)}})
            worker.send({"exit_code": exit_code, "seconds": seconds})
            worker.wait("finished", seconds)
            worker.kill()  # nothing is left for it to do
        except _WorkerError as error:
            self._off(f"the run was not closed ({error}); complete the upload with: wandb sync {worker.folder}/*run-*")

    def _tell(self, message: Mapping[str, Any]) -> None:
        if self._worker is None:
            return
        try:
            self._worker.send(message)
        except _WorkerError as error:
            self._worker = None
            self._off(str(error))

    def _off(self, reason: str) -> None:
        self.mode = "off"
        logger.info(f"wandb: off, {reason}. Training goes on; metrics.jsonl has every metric")


class _WorkerError(Exception):
    """The wandb process failed or did not answer, and has been ended."""


class _Worker:
    """observe.wandb_worker as a child process. Neither pipe is waited for but in `wait`."""

    def __init__(self, job: Mapping[str, Any], folder: Path) -> None:
        self.folder = folder
        self._temporary = tempfile.mkdtemp(prefix="chatgot-wandb-")  # wandb leaves folders in TMPDIR when it is killed
        with open(folder / "worker.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "chatgot.observe.wandb_worker"],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": python_path(), "TMPDIR": self._temporary},
                start_new_session=True,  # a Ctrl-C on the terminal is for the training
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        os.set_blocking(self._in.fileno(), False)
        self._unsent, self._unread = bytearray(), b""
        self.send(job)

    def send(self, message: Mapping[str, Any]) -> None:
        """Hand over one message, or as much as the process takes now. Raises _WorkerError: it has reported a failure,
        has ended, or has not read for a long time.
        """
        self._unsent += json.dumps(message, default=str).encode("ascii") + b"\n"
        for reply in self._exchange(0.0):
            self._handle(reply)
        if len(self._unsent) > _MOST_UNSENT:
            self.kill()
            raise _WorkerError(f"it has not taken the last {_MOST_UNSENT >> 20} MiB of records")

    def wait(self, kind: str, seconds: float) -> Any:
        """Wait for the reply `kind`; returns its value. Raises _WorkerError: the process failed, or time is over."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            for reply in self._exchange(left):
                if kind in reply:
                    return reply[kind]
                self._handle(reply)
        self.kill()
        raise _WorkerError(f"wandb did not answer within {seconds:g} s")

    def kill(self) -> None:
        """End the process. Idempotent."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel, it dies when let go
            self._process.wait(timeout=5)
        self._in.close()
        self._out.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _handle(self, reply: dict[str, Any]) -> None:
        if "failed" in reply:
            self.kill()
            raise _WorkerError(reply["failed"])
        if "warning" in reply:
            logger.info(f"wandb: {reply['warning']}")

    def _exchange(self, seconds: float) -> list[dict[str, Any]]:
        """Write and read what can be without waiting, or after a wait of `seconds` at most; returns whole replies."""
        pipes = select.poll()
        pipes.register(self._out, select.POLLIN)
        if self._unsent:
            pipes.register(self._in, select.POLLOUT)
        ready = {descriptor for descriptor, _ in pipes.poll(1000 * seconds)}
        if self._in.fileno() in ready:
            try:
                del self._unsent[: os.write(self._in.fileno(), self._unsent)]
            except BrokenPipeError:
                self._unsent.clear()  # the process has ended; what it said before comes first
        if self._out.fileno() not in ready:
            return []
        if not (read := os.read(self._out.fileno(), 1 << 16)):
            return [{"failed": f"its process has ended (see {self.folder / 'worker.log'})"}]
        *lines, self._unread = (self._unread + read).split(b"\n")
        return [json.loads(line) for line in lines if line.startswith(b"{")]  # else a sitecustomize prints


def _run_id(folder: Path) -> tuple[str, bool]:
    """Read or make the run folder's wandb id; returns it, and whether it existed.

    It is stored before wandb sees it, so that a kill during init cannot fork the run.
    """
    path = folder / "run_id.json"
    try:
        stored = json.loads(run_folder.read_bytes(path))["id"]
        if isinstance(stored, str) and stored:
            return stored, True
        raise ValueError(f"id = {stored!r}")
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        logger.info(f"wandb: {path} cannot be read ({error}); this run folder gets a new wandb run")
    folder.mkdir(parents=True, exist_ok=True)
    new = secrets.token_hex(4)
    write_atomically(folder / LAST_RECORD, json.dumps({"step": -1, "names": []}))
    write_atomically(path, json.dumps({"id": new}))
    return new, False
