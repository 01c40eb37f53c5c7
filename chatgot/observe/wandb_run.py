"""One wandb run per run folder, beside the journal. wandb can neither stop nor slow nor hang a training.

The training process never imports wandb: observe.wandb_worker does, in a process of its own that is waited for with a
bound and killed when the bound is over. Why not DeepSpeed's WandbMonitor: it sets no id, no resume and no mode, puts
samples on the step axis, and raises on rank 0 alone when there is no API key (deepspeed/monitor/wandb.py, 0.19.8).
"""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chatgot.run_folder as run_folder
from chatgot.distributed import python_path
from chatgot.files import write_atomically
from chatgot.observe.journal import METRICS, newest_step, read_lines, with_numbers
from chatgot.observe.wandb_worker import LAST_RECORD

if TYPE_CHECKING:
    from chatgot.deepspeed_json.resolve import WandbConfig

logger = logging.getLogger(__name__)
_QUEUED_LINES = 10_000
ARTIFACT_SECONDS = 1800.0
"""Granted to the upload at the end where artifacts were asked for."""
_ADDED = ("val/", "sample/")
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
    """Rank 0's wandb run, or nothing at all where wandb is disabled, missing or broken. Made by `start`."""

    def __init__(self, finish_timeout: float) -> None:
        self._finish_timeout = finish_timeout
        self._last_step = -1
        self._half_sent: tuple[int, set[str]] = (-1, set())
        """A step that a kill may have cut in two, and the metrics of it that were logged."""
        self._worker: _Worker | None = None
        self.id: str | None = None
        self.mode: str = "off"
        """online, offline, or off: nothing is sent anywhere."""

    @classmethod
    def start(
        cls,
        config: WandbConfig,
        *,
        run_dir: Path,
        run_name: str,
        run_config: Mapping[str, Any],
        resumed_from_step: int | None = None,
        tags: Sequence[str] = (),
        init_timeout: float = 30.0,
        finish_timeout: float = 60.0,
    ) -> WandbRun:
        """Open or continue the run folder's wandb run. No fault of wandb, the network or the server is raised.

        Args:
            run_dir: keeps the id in wandb/run_id.json and what wandb has in wandb/last_record.json, with wandb's own
                files beside them. Steps that wandb has, trained again after a resume, are not logged a second time;
                steps that a kill kept from it, and that are not trained again, are sent from metrics.jsonl.
            run_config: the resolved configuration, shown by wandb.
            resumed_from_step: the checkpoint's step; None for a new start.
            init_timeout: seconds granted to go online; then offline is granted as many, then wandb is off.
            finish_timeout: seconds granted to the upload at the end.
        """
        self = cls(finish_timeout)
        if not config.enabled:
            return self
        if os.environ.get("WANDB_MODE", "").lower() == "disabled":
            logger.info("wandb: off (WANDB_MODE=disabled)")
            return self
        folder = run_dir / run_folder.WANDB
        try:
            self.id, known = _run_id(folder)
        except OSError as error:
            self._off(f"its id cannot be kept: {error}")
            return self
        journal = run_dir / run_folder.METRICS
        if known:
            self._last_step, names = _last_record(folder, journal)
            self._half_sent = (self._last_step, names)
        job = {
            "id": self.id,
            "dir": str(run_dir),
            "name": run_name,
            "config": dict(run_config),
            "tags": list(tags),
            "project": config.project,
            "group": config.group,
            "team": config.team,
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
            what = f"run {self.id} goes on, {self.mode}" if known else f"new run {self.id} {self.mode}"
            more = f" ({because}); upload later: wandb sync {folder}/offline-run-*" if because else f": {ready['url']}"
            logger.info(f"wandb: {what}{more}")
            if known and resumed_from_step is not None:
                self._catch_up(journal, resumed_from_step)
            return self
        self._off(str(failure))
        return self

    def log(self, metrics: Mapping[str, float | int | None], step: int) -> None:
        """Send a step's metrics. Never blocks. A step's calls are one record, sent when the next step comes."""
        self._send(step, {name: value for name, value in metrics.items() if value is not None and name != "step"}, {})

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Send a table, e.g. of samples, as part of the step's record. Never blocks."""
        self._send(step, {}, {name: {"columns": columns, "rows": rows}})

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

    def rolled_back(self, from_step: int) -> None:
        """The run goes back from this step: wandb, which cannot forget, gets the steps up to it only once."""
        self._last_step = max(self._last_step, from_step)
        self._half_sent = (-1, set())

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

    def _catch_up(self, journal: Path, to_step: int) -> None:
        """Send what the journal has up to the checkpoint's step and wandb lacks: a kill came between."""
        if to_step < self._last_step:
            return
        records = read_lines(journal, after=self._last_step - 1, without=b'"digest"')
        rows = [
            with_numbers(row)
            for row in records
            if row is not None and isinstance(row.get("step"), int) and self._last_step <= row["step"] <= to_step
        ]
        if len(rows) > _QUEUED_LINES // 2:
            logger.info(f"wandb: has no record of {len(rows)} steps; the newest {_QUEUED_LINES // 2} are sent now")
        for row in rows[-_QUEUED_LINES // 2 :]:
            self.log(row, row["step"])
        known = self._half_sent[1] if to_step == self._last_step else set[str]()
        self._half_sent = (to_step, known.union(*(row for row in rows if row["step"] == to_step)))
        self._last_step = to_step

    def _send(self, step: int, metrics: dict[str, float | int], tables: dict[str, Any]) -> None:
        half, logged = self._half_sent
        if step == half:  # what an evaluation adds to a step, or samples; the rest came with the step
            metrics = {name: metrics[name] for name in metrics if name not in logged and name.startswith(_ADDED)}
        if step > self._last_step or (step == half and metrics):
            self._tell({"step": step, "metrics": metrics, "tables": tables})

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
    """observe.wandb_worker as a child process, with a thread for each direction, because both pipes block."""

    def __init__(self, job: Mapping[str, Any], folder: Path) -> None:
        self.folder = folder
        self._temporary = tempfile.mkdtemp(prefix="chatgot-wandb-")  # wandb leaves folders in TMPDIR when it is killed
        with open(folder / "worker.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "chatgot.observe.wandb_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": python_path(), "TMPDIR": self._temporary},
                start_new_session=True,  # a Ctrl-C on the terminal is for the training
            )
        self._replies: queue.Queue[dict[str, Any]] = queue.Queue()
        self._lines: queue.Queue[bytes | None] = queue.Queue(maxsize=_QUEUED_LINES)
        self._threads = [
            threading.Thread(target=self._read, name="wandb-replies", daemon=True),
            threading.Thread(target=self._write, name="wandb-lines", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self.send(job)

    def send(self, message: Mapping[str, Any]) -> None:
        """Log the warnings that have come in, and queue one message. Raises _WorkerError: the process has reported a
        failure, has ended, or has not read for a long time.
        """
        while not self._replies.empty():
            self._handle(self._replies.get())
        try:
            self._lines.put_nowait(json.dumps(message, default=str).encode("ascii") + b"\n")
        except queue.Full:
            self.kill()
            raise _WorkerError(f"it has not taken the last {_QUEUED_LINES} records") from None

    def wait(self, kind: str, seconds: float) -> Any:
        """Wait for the reply `kind`; returns its value. Raises _WorkerError: the process failed, or time is over."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                reply = self._replies.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.kill()
                raise _WorkerError(f"wandb did not answer within {seconds:g} s") from None
            if kind in reply:
                return reply[kind]
            self._handle(reply)

    def kill(self) -> None:
        """End the process and both threads. Idempotent."""
        self._process.kill()
        try:
            self._process.wait(timeout=5)
            self._lines.put_nowait(None)
        except (subprocess.TimeoutExpired, queue.Full):
            pass  # stuck in the kernel, it dies when let go; a full queue has a writer, whom the broken pipe ends
        for thread in self._threads:
            thread.join(timeout=1)
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _handle(self, reply: dict[str, Any]) -> None:
        if "failed" in reply:
            self.kill()
            raise _WorkerError(reply["failed"])
        if "warning" in reply:
            logger.info(f"wandb: {reply['warning']}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as replies:
            for line in replies:
                if line.startswith(b"{") and line.endswith(b"}\n"):  # else it was killed, or a sitecustomize prints
                    self._replies.put(json.loads(line))
        self._replies.put({"failed": f"its process has ended (see {self.folder / 'worker.log'})"})

    def _write(self) -> None:
        assert self._process.stdin is not None
        try:
            with self._process.stdin as pipe:
                while (line := self._lines.get()) is not None:
                    pipe.write(line)
                    pipe.flush()
        except BrokenPipeError:
            pass  # the process has ended; the reading thread says so


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


def _last_record(folder: Path, journal: Path) -> tuple[int, set[str]]:
    """Find out which step's record wandb was handed last, -1 for none, and what the record had."""
    path = folder / LAST_RECORD
    try:
        last = json.loads(run_folder.read_bytes(path))
        return int(last["step"]), set(last["names"])
    except FileNotFoundError:
        pass  # an earlier version of ChatGoT kept none
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.info(f"wandb: {path} cannot be read ({error}); what {journal} has is not sent again")
    newest = newest_step(journal)
    return -1 if newest is None else newest, set(METRICS)
