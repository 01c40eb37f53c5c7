"""The process that owns a wandb run, started and fed by observe.wandb_run. A process, because it can be killed.

Measured with wandb 0.31: a wandb.init that a silent server keeps waiting leaves its run id "in use", so that the same
process cannot go offline with it, and holds the interpreter's exit for another 12 s. In a process of its own all that
is one kill away. It also outlives a killed training just long enough to hand over what it was given.

Protocol, one JSON object a line. In, on standard input: the job, then {"step", "metrics" or "tables"}, {"summary"},
{"alert"}, {"artifact"}..., then {"exit_code", "seconds"} or the end of input, which means that the training is gone.
Out, on what was standard output before it became worker.log: {"ready": {...}} or {"failed": why}; {"warning": text};
{"finished": true}.
"""

from __future__ import annotations

import io
import json
import netrc
import os
import re
import shutil
import signal
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

import chatgot.run_folder as run_folder
from chatgot.observe.journal import METRICS, newest_step, read_lines, with_numbers

LAST_RECORD = "last_record.json"
"""In the wandb folder: the step of the last record that wandb was handed, and the names of what it had."""
STEP = "train/step"
"""The step axis of every chart. wandb's own step counter is not used: it silently drops what is out of order."""

_ADDED = ("val/", "sample/")
"""Metrics that a step gets later than the others; a kill may have come between."""
_REACH_SECONDS = 3.0
_TRAINING_IS_GONE = 1
_LATER = 5.0
"""Seconds after which this process ends by itself where the training, which waits for it, should have ended it."""


def _reply(descriptor: int, **message: Any) -> None:
    with suppress(BrokenPipeError):  # the training is gone
        os.write(descriptor, json.dumps(message).encode("ascii") + b"\n")


class _Stderr(io.TextIOBase):
    """Writes standard error to worker.log, and sends wandb's warnings and errors to the training process, too."""

    encoding = "utf-8"

    def __init__(self, log: TextIO, reply: Callable[..., None]) -> None:
        self._log = log
        self._reply = reply
        self._line = ""

    def write(self, text: str) -> int:
        self._log.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            plain = re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
            if re.match(r"wandb: (WARNING|ERROR) ", plain):
                self._reply(warning=plain.removeprefix("wandb: "))
        return len(text)

    def flush(self) -> None:
        self._log.flush()

    def fileno(self) -> int:
        return self._log.fileno()


def main() -> None:
    """Run one wandb run from the first line of standard input to its end."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the training gets them too, and decides
        signal.signal(ignored, signal.SIG_IGN)
    reply = partial(_reply, os.dup(1))
    os.dup2(2, 1)
    sys.stderr = _Stderr(sys.stderr, reply)
    job = json.loads(sys.stdin.buffer.readline())
    try:
        folder = Path(job["run"]["dir"])
        has = _last_record(folder)
        wandb, run = _open(job, reply)
        end = _feed(wandb, run, folder, has, job["resumed_from_step"])
        seconds = end["seconds"] + _LATER if "seconds" in end else job["finish_timeout"]
        bound = threading.Timer(seconds, os._exit, args=(1,))
        bound.daemon = True
        bound.start()
        run.finish(exit_code=end["exit_code"])
        reply(finished=True)
        exit_status = 0
    except Exception as error:  # noqa: BLE001  whatever wandb raises, the training hears of it and goes on
        reply(failed=describe(error))
        exit_status = 1
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)  # nobody else does, where the training is gone
    sys.stderr.flush()
    os._exit(exit_status)  # the run is closed; wandb's exit hook would only wait, seconds where the server is silent


def _open(job: dict[str, Any], reply: Callable[..., None]) -> tuple[Any, Any]:
    import wandb

    settings = wandb.setup().settings
    if settings.mode == "disabled":
        raise RuntimeError("wandb's settings file says `disabled` (undo it with `wandb online`)")
    offline_because = job["offline_because"] or _why_offline(settings)
    own = {
        "console": "off",
        # a little tighter than the bounds around it, so that wandb ends by itself
        "init_timeout": 0.8 * job["init_timeout"],
        "finish_timeout": 0.8 * job["finish_timeout"],
        "x_transaction_log_flush_interval": 1.0,  # wandb's 15 s is what a machine that dies would lose
        "x_stats_pid": job["pid"],
    }
    run = wandb.init(
        **job["run"],
        resume="allow",
        mode="offline" if offline_because else "online",
        allow_val_change=True,  # a resumed run may have another world size or precision
        settings=wandb.Settings(**{key: value for key, value in own.items() if key in wandb.Settings.model_fields}),
    )
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)
    run.define_metric("val/loss", step_metric=STEP, summary="min,last")
    reply(ready={"offline_because": offline_because, "url": None if offline_because else run.url})
    return wandb, run


def _feed(wandb: Any, run: Any, folder: Path, has: tuple[int, set[str]], to_step: int | None) -> dict[str, Any]:
    """Log until the end and return how it ends: {"exit_code", "seconds"}. Lines of one step are one record, sent when
    the next step comes and noted in a file, so that a resume knows what wandb has. wandb cannot forget: a step that it
    has is sent again only for what an evaluation adds, or samples.
    """
    (last, names), path = has, folder / run_folder.WANDB / LAST_RECORD
    newest, said = last - 1, False

    def log(record: dict[str, Any]) -> None:
        nonlocal newest, said
        run.log(record)
        newest = record[STEP]
        try:
            _note(record, str(path))
        except OSError as error:  # a full disk costs no dashboard
            if not said:
                print(f"wandb: WARNING {path}: {error}; a resume may send steps twice", file=sys.stderr)
            said = True

    pending: dict[str, Any] = {}
    end: dict[str, Any] = {"exit_code": _TRAINING_IS_GONE}
    for message in _messages(folder / run_folder.METRICS, last, to_step):
        if "exit_code" in message:
            end = message
            break
        if "step" not in message:
            _tell(wandb, run, message)
            continue
        step, metrics = message["step"], message.get("metrics", {})
        if step == last:
            metrics = {name: metrics[name] for name in metrics if name not in names and name.startswith(_ADDED)}
        if step <= newest or (step == last and not metrics):
            continue
        if pending and pending[STEP] != step:
            log(pending)
            pending = {}
        pending = {STEP: step, **pending, **metrics}
        for name, table in message.get("tables", {}).items():
            pending[name] = wandb.Table(columns=table["columns"], data=table["rows"])
    if pending:
        log(pending)
    return end


def _messages(journal: Path, last: int, to_step: int | None) -> Iterator[dict[str, Any]]:
    """What a kill kept from wandb, from the journal up to the checkpoint of `to_step`; then what the training sends."""
    if to_step is not None:
        for row in read_lines(journal, after=last - 1, without=b'"digest"'):
            if row is not None and isinstance(step := row.get("step"), int) and last <= step <= to_step:
                row = with_numbers(row)
                yield {"step": step, "metrics": {name: row[name] for name in METRICS if name in row}}
    for line in sys.stdin.buffer:
        try:
            yield json.loads(line)
        except ValueError:  # the training was killed while it wrote this line, so it is the last
            return


def _last_record(folder: Path) -> tuple[int, set[str]]:
    """Find out which step's record wandb was handed last, -1 for none, and what the record had."""
    path, journal = folder / run_folder.WANDB / LAST_RECORD, folder / run_folder.METRICS
    try:
        last = json.loads(run_folder.read_bytes(path))
        return int(last["step"]), set(last["names"])
    except FileNotFoundError:
        pass  # an earlier version of ChatGoT kept none
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        print(f"wandb: WARNING {path} cannot be read ({error}); what {journal} has is not sent again", file=sys.stderr)
    newest = newest_step(journal)
    return -1 if newest is None else newest, set(METRICS)


def _note(record: dict[str, Any], path: str) -> None:
    """Replace the file without a flush to the disk, which would cost too much at every step."""
    new = path + ".new"
    with suppress(FileNotFoundError):
        os.unlink(new)  # of a kill; or a link, which is not to be followed
    with open(new, "x", encoding="ascii") as file:
        json.dump({"step": record[STEP], "names": list(record)}, file)
    os.replace(new, path)


def _tell(wandb: Any, run: Any, message: dict[str, Any]) -> None:
    """Do what belongs to no step."""
    if "summary" in message:
        run.summary.update(message["summary"])
    elif "alert" in message:
        run.alert(**message["alert"])
    elif "artifact" in message:
        kind, path = message["artifact"]["kind"], message["artifact"]["path"]
        artifact = wandb.Artifact(f"{kind}-{run.id}", type={"checkpoint": "model"}.get(kind, kind))
        if os.path.isdir(path):
            artifact.add_dir(path, policy="immutable")  # not copied first
        else:
            artifact.add_file(path)
        run.log_artifact(artifact, aliases=[os.path.basename(path)])


def _why_offline(settings: Any) -> str | None:
    """Find out why this run cannot be online; None: it can."""
    if settings.mode in ("offline", "dryrun"):
        mode = os.environ.get("WANDB_MODE")
        return f"WANDB_MODE={mode}" if mode else "wandb's settings file says so"
    address = urlsplit(settings.base_url)
    if not (settings.api_key or getattr(settings, "identity_token_file", None) or _netrc_has_key(address.netloc)):
        return f"no API key for {address.netloc}: set WANDB_API_KEY or run `wandb login`"
    proxy = urllib.request.getproxies().get(address.scheme)
    through = urlsplit(proxy) if proxy and not urllib.request.proxy_bypass(address.hostname or "") else address
    host, port = through.hostname or "", through.port or (443 if through.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=_REACH_SECONDS).close()
    except OSError as error:
        return f"{host}:{port} cannot be reached: {describe(error)}"
    return None


def _netrc_has_key(host: str) -> bool:
    for path in [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]:
        try:
            if netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except FileNotFoundError:
            continue
        except (netrc.NetrcParseError, OSError) as error:
            print(f"wandb: WARNING {path} cannot be read: {error}", file=sys.stderr)
    return False


def describe(error: BaseException) -> str:
    """Put an error on one line: the type and the message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    main()
