"""A signal ends a run with 75 and a checkpoint of that very step; the run then goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import chatgot.run_folder as run_folder
from chatgot.data.loader import EvalBatches
from chatgot.errors import RunAgainError
from chatgot.observe.journal import newest_step
from chatgot.observe.status import note_refused_start, status
from chatgot.training import evaluation, preparation, run
from chatgot.training.loop import Loop
from chatgot.training.saving import Saving
from chatgot.training.stop import BEFORE_JOB_ENDS_SECONDS, StopSignals
from tests.distributed.programs.runs import weights_digest
from tests.support import (
    ROOT,
    engine_json,
    environment,
    free_port,
    place_of,
    warm_python,
    write_json,
    write_run_yaml,
)
from tests.training import in_process
from tests.training.in_process import argv, events, series, tags

BOUND = 300  # seconds: a hang is a failure


def test_the_death_of_a_rank_ends_the_other_with_6_and_no_traceback(endless, tmp_path):
    out = tmp_path / "out"
    ranks = start(endless, 2)
    wait_for_step(out, 3, ranks)
    ranks[1].kill()
    said = end(ranks)[0]
    assert ranks[0].returncode == 6, said
    assert "chatgot: rank 0: another rank is gone or does not answer (" in said
    assert "Traceback" not in said
    assert events(out, "failed")[0]["exit_code"] == status(out)[1] == 6
    assert not (out / run_folder.LOCK).exists()


@pytest.fixture
def endless(tmp_path, text_file) -> list[str]:
    """The command line of a run that only a signal ends, with a rate that doesn't depend on its length."""
    config = write_run_yaml(tmp_path / "run.yaml", max_steps=1_000_000, model={"dropout": 0.1})
    engine = write_json(
        tmp_path / "engine.json",
        engine_json(2, micro=2, chatgot={"schedule": {"type": "constant", "warmup_steps": 2}}),
    )
    return argv(engine, tmp_path / "out", config, text_file)


def start(command_line: list[str], world_size: int) -> list[subprocess.Popen]:
    """The ranks; those of more than one find each other as under a launcher."""
    port = free_port()
    return [
        subprocess.Popen(
            [warm_python(), str(ROOT / "launch" / "train.py"), *command_line],
            env=environment(**(place_of(rank, world_size, port) if world_size > 1 else {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def wait_for_step(out: Path, step: int, ranks: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + BOUND
    while (newest_step(out / "metrics.jsonl") or 0) < step:
        assert time.monotonic() < deadline, "no step was made"
        assert all(rank.poll() is None for rank in ranks), "a rank has ended"
        time.sleep(0.02)


def end(ranks: list[subprocess.Popen]) -> list[str]:
    """What every rank said; kills those that do not end."""
    try:
        return [rank.communicate(timeout=BOUND)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_terminated_run_saves_and_goes_on_bit_for_bit(endless, tmp_path):
    out = tmp_path / "out"
    ranks = start(endless, 1)
    wait_for_step(out, 5, ranks)
    ranks[0].send_signal(signal.SIGTERM)
    [said] = end(ranks)
    assert ranks[0].returncode == 75, said
    assert "Run the same command again to go on (exit 75)" in said
    stopped = newest_step(out / "metrics.jsonl")
    assert stopped is not None
    assert stopped >= 5
    assert tags(out) == [stopped]
    [event] = events(out, "preempted")
    assert (event["step"], event["signal"]) == (stopped, "SIGTERM")

    length = f"train.max_steps={stopped + 3}"
    assert in_process.train([*endless, length]) == 0
    whole = [word if word != str(out) else str(tmp_path / "whole") for word in endless]
    assert in_process.train([*whole, length]) == 0
    for metric in ("train/loss", "optim/lr", "optim/grad_norm", "val/loss"):
        assert series(out, metric) == series(tmp_path / "whole", metric)
    assert weights_digest(out) == weights_digest(tmp_path / "whole")


def test_signal_to_one_rank_of_two_stops_and_saves_both(endless, tmp_path):
    out = tmp_path / "out"
    ranks = start(endless, 2)
    wait_for_step(out, 3, ranks)
    ranks[1].send_signal(signal.SIGTERM)
    said = end(ranks)
    assert [rank.returncode for rank in ranks] == [75, 75], said
    assert tags(out) == [newest_step(out / "metrics.jsonl")]
    assert len(events(out, "preempted")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_each_signal_stops_after_the_step_in_which_it_came(number, endless, tmp_path, monkeypatch):
    step = Loop._train_step

    def interrupted(self):
        if self.step == 2:
            os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(Loop, "_train_step", interrupted)
    before = signal.getsignal(number)
    assert in_process.train(endless) == 75
    assert tags(tmp_path / "out") == [3]
    assert events(tmp_path / "out")[-1]["signal"] == number.name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("limit", ["--max_minutes 0.02", "the end of Slurm's job"])
def test_a_run_that_is_out_of_time_is_saved_and_ended(limit, endless, tmp_path, monkeypatch):
    if not limit.startswith("--"):
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 2 + BEFORE_JOB_ENDS_SECONDS))
    more = limit.split() if limit.startswith("--") else []
    assert in_process.train([*endless, *more]) == 75
    [event] = events(tmp_path / "out", "preempted")
    assert event["signal"] == limit
    assert tags(tmp_path / "out")[-1] == event["step"] == newest_step(tmp_path / "out" / "metrics.jsonl")


def test_signal_within_an_evaluation_ends_it_after_the_batch_and_the_resume_makes_up_for_it(
    endless, tmp_path, monkeypatch
):
    line = [*endless, "train.max_steps=6", "train.eval_every=2", "data.val_fraction=0.3"]
    whole = [*line, "--out_dir", str(tmp_path / "whole")]
    assert in_process.train(whole) == 0
    batches = 0

    def counted(self):
        nonlocal batches
        for batch in original(self):
            batches += 1
            if batches == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    original = EvalBatches.__iter__
    monkeypatch.setattr(EvalBatches, "__iter__", counted)
    assert in_process.train(line) == 75
    assert batches == 3
    assert (tags(tmp_path / "out"), series(tmp_path / "out", "val/loss")) == ([2], {})
    assert in_process.train(line) == 0
    for name in ("val/loss", "train/loss"):
        assert series(tmp_path / "out", name) == series(tmp_path / "whole", name), "bit for bit"


def test_a_save_that_is_due_within_an_evaluation_is_made_there(endless, tmp_path, monkeypatch):
    line = [*endless, "train.max_steps=2", "train.eval_every=2", "data.val_fraction=0.3"]
    loop = in_process.prepare([*line, "ds.chatgot.checkpoint.every_minutes=1"])
    clock = 0.0

    def slow(self):
        nonlocal clock
        for batch in original(self):
            clock += 50.0
            yield batch
            if clock >= 200.0:
                assert tags(tmp_path / "out") == [2]
                raise KeyboardInterrupt  # as a kill would

    original = EvalBatches.__iter__
    monkeypatch.setattr(EvalBatches, "__iter__", slow)
    loop.saving = Saving(loop.saving.saver, loop.records, clock=lambda: clock)
    with pytest.raises(KeyboardInterrupt):
        list(loop.steps())
    assert [event["step"] for event in events(tmp_path / "out", "saved")] == [2], "once: the state is the same"
    assert all(module.training for module in loop.engine.engine.module.modules())
    monkeypatch.undo()
    run_folder.release_lock(tmp_path / "out")
    assert in_process.train(line) == 0
    assert list(series(tmp_path / "out", "val/loss")) == [2]


@pytest.mark.parametrize("where", ["prepare_data", "build", "open_saver"])
def test_signal_while_the_run_starts_ends_it_with_75_and_leaves_no_lock(where, endless, tmp_path, monkeypatch):
    module = preparation if where == "prepare_data" else run
    original = getattr(module, where)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, where, interrupted)
    with pytest.raises(RunAgainError, match="stopped by SIGTERM before the first step: nothing is lost") as refusal:
        in_process.train(endless)
    assert refusal.value.exit_code == 75
    monkeypatch.undo()
    assert in_process.train([*endless, "train.max_steps=1"]) == 0, "the folder is free"


def test_signal_while_a_start_waits_for_another_rank_ends_it_with_75(endless):
    """Rank 1 of 2 never comes: rank 0 waits for it outside of Python."""
    place = place_of(0, 2, free_port())
    words = [warm_python(), str(ROOT / "launch" / "train.py"), *endless]
    rank = subprocess.Popen(words, env=environment(**place), stdout=-1, stderr=-1, text=True)
    deadline = time.monotonic() + BOUND
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", int(place["MASTER_PORT"]))):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    time.sleep(1.0)
    rank.send_signal(signal.SIGTERM)
    _, said = rank.communicate(timeout=30)
    assert rank.returncode == 75
    assert "stopped by SIGTERM before the first step" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_before_anybody_listens_is_heard_later(number, endless, monkeypatch, tmp_path):
    """train.py has just begun to import chatgot; before, such a start ended by the signal, without a word."""
    (tmp_path / "signals.py").write_text(f"""
import os, sys
class Interrupts:
    def find_spec(self, name, path, target=None):
        if name == "chatgot.cli":
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Interrupts())
""")
    begin = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import signals, runpy; "
    begin += f"sys.argv[0] = {str(ROOT / 'launch' / 'train.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [sys.executable, "-c", begin, *endless]
    hears = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # noqa: E731
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=BOUND, preexec_fn=hears)
    assert done.returncode == 75, done.stderr
    assert done.stderr.startswith(f"chatgot: stopped by {number.name} before the first step")
    assert status(tmp_path / "out")[1] == 75


def test_signal_while_torch_is_imported_ends_the_start_with_75(endless):
    program = """
import os, signal, sys
from chatgot import cli

class Interrupts:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Interrupts())
cli.train(sys.argv[1:])
"""
    words = [sys.executable, "-c", program, *endless]
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=BOUND)
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr.startswith("chatgot: stopped by SIGTERM before the first step")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("gloo/transport/tcp/pair.cc: Connection closed by peer", 75, "rank 1 was stopped"),
        ("a tensor is missing", 1, "a tensor is missing"),
    ],
)
def test_a_start_that_has_lost_another_rank_leaves_the_word_to_that_one(error, code, said, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")

    def start():
        with StopSignals(starting=True, out_dir=tmp_path / "out"):
            note_refused_start(tmp_path / "out", "rank 1 was stopped", 75)
            raise RuntimeError(error)

    with pytest.raises(RuntimeError):
        start()
    found = f"the last start ended before its first step, with exit code {code}: {said}"
    assert status(tmp_path / "out") == (found, code)


@pytest.mark.parametrize("look", ["evaluate", "draw"])
def test_signal_while_evaluating_or_sampling_stops_after_that_step(look, endless, tmp_path, monkeypatch):
    original = getattr(evaluation, look)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(evaluation, look, interrupted)
    assert in_process.train([*endless, "train.eval_every=2", "train.sample_every=2"]) == 75
    assert tags(tmp_path / "out") == [2]


def test_signal_in_the_last_step_leaves_its_evaluation_to_the_next_start(endless, tmp_path, monkeypatch):
    step = Loop._train_step

    def interrupted(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Loop, "_train_step", interrupted)
    assert in_process.train([*endless, "train.max_steps=3"]) == 75, "its evaluation may take longer than the grace"
    assert (tags(tmp_path / "out"), series(tmp_path / "out", "val/loss")) == ([3], {})
    assert in_process.train([*endless, "train.max_steps=3"]) == 0
    assert events(tmp_path / "out")[-1]["event"] == "finished"
    assert list(series(tmp_path / "out", "val/loss")) == [3]
    assert [path.name for path in (tmp_path / "out" / "samples").iterdir()] == ["step-000003.txt"]
    before = in_process.contents(tmp_path / "out" / "checkpoints")
    assert in_process.train([*endless, "train.max_steps=3"]) == 0, "nothing is owed any more"
    assert in_process.contents(tmp_path / "out" / "checkpoints") == before


def test_second_interrupt_ends_at_once_with_130():
    program = """
import os, signal
from chatgot.training.stop import StopSignals
with StopSignals() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    print(stop.received, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=BOUND
    )
    assert (done.returncode, done.stdout) == (130, "SIGINT\n")


@pytest.mark.slow
def test_a_rank_that_never_gives_the_gil_back_ends_when_its_launcher_is_gone():
    rank = """
import re
from chatgot.training.stop import StopSignals
with StopSignals():
    print(os.getpid(), flush=True)
    re.match(r"(a+)+$", "a" * 60 + "b")
"""
    launcher = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {'import os' + rank!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", launcher], env=environment(CHATGOT_ATTEMPT="1"), cwd=ROOT, stdout=-1, text=True
    )
    assert process.stdout is not None
    stat = Path(f"/proc/{int(process.stdout.readline())}/stat")
    time.sleep(2.0)
    process.kill()
    process.communicate()
    killed = time.monotonic()
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < killed + 60
        time.sleep(0.1)
