from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatgot.observe import journal
from chatgot.observe.journal import METRICS, Branch, Events, Journal, newest_step, read_journal, read_lines
from tests.support import live_metrics


def test_records_are_read_back_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    journal.append({"step": 10, "train/loss": 1.25, "data/tokens": 40960, "val/loss": None})
    journal.append({"step": 20, "train/loss": math.nan, "optim/grad_norm": math.inf, "optim/lr": -math.inf})
    journal.close()
    (first, second), broken = read_journal(path)
    assert broken == 0
    assert first == {"step": 10, "train/loss": 1.25, "data/tokens": 40960}
    assert math.isnan(second["train/loss"])
    assert second["optim/grad_norm"] == math.inf
    assert second["optim/lr"] == -math.inf


def test_non_finite_numbers_are_valid_json_on_disk(tmp_path):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    Journal(tmp_path / "m.jsonl").append({"step": 1, "train/loss": math.nan, "optim/grad_norm": -math.inf})
    Events(tmp_path / "e.jsonl").event("skipped", grad_norms=[1.0, math.inf], deep={"loss": math.nan})
    for name in ("m.jsonl", "e.jsonl"):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"step": 1, "train/los": 1.0}, "unknown metric 'train/los'"),
        ({"train/loss": 1.0}, "needs 'step'"),
        ({"step": -1, "train/loss": 1.0}, "needs 'step'"),
        ({"step": 1.0, "train/loss": 1.0}, "needs 'step'"),
        ({"step": 1, "train/loss": "low"}, "expected a number"),
        ({"step": 1, "train/loss": True}, "expected a number"),
    ],
)
def test_a_record_that_is_not_a_steps_metrics_is_refused(tmp_path, record, message):
    journal = Journal(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=message):
        journal.append(record)
    assert read_journal(tmp_path / "metrics.jsonl") == ([], 0)


def test_the_metric_names_are_those_that_scripts_rely_on():
    assert METRICS == (
        "train/loss",
        "val/loss",
        "val/bits_per_char",
        "optim/lr",
        "optim/grad_norm",
        "optim/loss_scale",
        "optim/skipped_steps",
        "perf/tokens_per_sec",
        "perf/step_ms",
        "perf/mfu",
        "mem/peak_gib",
        "data/tokens",
        "sample/copied_fraction",
        "sample/longest_copy",
        "goodput/wall_seconds",
    )


def test_numpy_and_torch_numbers_are_numbers(tmp_path):
    import numpy as np

    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append({"step": np.int64(3), "train/loss": np.float32(0.5), "data/tokens": np.int64(7)})
    assert read_journal(tmp_path / "metrics.jsonl")[0] == [{"step": 3, "train/loss": 0.5, "data/tokens": 7}]


def test_every_cut_of_the_last_line_is_reported_and_costs_only_that_line(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "metrics.jsonl"
    Journal(path).append({"step": 1, "train/loss": 2.0})
    whole = path.read_bytes()
    second = b'{"step": 2, "train/loss": 1.5}\n'
    for cut in range(1, len(second)):
        path.write_bytes(whole + second[:cut])
        caplog.clear()
        journal = Journal(path)
        assert caplog.messages[0].startswith(f"{path}: the last line was cut off")
        journal.append({"step": 3, "train/loss": 1.0})
        journal.close()
        records, broken = read_journal(path)
        only_the_newline_was_cut = cut == len(second) - 1
        assert broken == (0 if only_the_newline_was_cut else 1)
        assert [r["step"] for r in records] == ([1, 2, 3] if only_the_newline_was_cut else [1, 3])
        assert path.read_bytes().startswith(whole + second[:cut] + b"\n"), "what was there stays there"


def test_a_whole_file_opens_without_a_note(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    Journal(tmp_path / "m.jsonl").append({"step": 1})
    Journal(tmp_path / "m.jsonl")
    Journal(tmp_path / "new.jsonl")
    assert caplog.messages == []


def test_lines_that_a_power_cut_left_as_zeros_or_noise_are_counted(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\0\n\xff\xfe\n[1]\n{"step": 2}\n')
    assert read_journal(path) == ([{"step": 1}, {"step": 2}], 3)


def test_a_missing_file_has_no_records(tmp_path):
    assert read_journal(tmp_path / "none.jsonl") == ([], 0)
    assert live_metrics(tmp_path / "none.jsonl") == []


def test_a_killed_writer_leaves_at_most_one_broken_line(tmp_path):
    path = tmp_path / "m.jsonl"
    script = (
        "import itertools, sys\nfrom chatgot.observe.journal import Journal\njournal = Journal(sys.argv[1])\n"
        "for step in itertools.count():\n    journal.append({'step': step, 'train/loss': 1 / 3})\n"
        "    if step == 200:\n        print('running', flush=True)\n"
    )
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == b"running\n"
            process.send_signal(signal.SIGKILL)
        process.wait()
        records, broken = read_journal(path)
        assert broken <= 1
        assert [r["step"] for r in records] == list(range(len(records)))
        path.unlink()


def test_a_line_that_the_disk_cut_short_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "m.jsonl"
    script = (
        "import resource, sys\nfrom chatgot.observe.journal import Journal\njournal = Journal(sys.argv[1])\n"
        "journal.append({'step': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))\n"
        "journal.append({'step': 2, 'train/loss': 0.5})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "journal.append({'step': 3})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout == ""
    assert "cannot be written: [Errno 27]" in done.stderr
    assert read_journal(path) == ([{"step": 1}, {"step": 3}], 1)


def test_live_metrics_has_one_record_per_step_and_the_last_word_wins(tmp_path):
    journal = Journal(tmp_path / "m.jsonl")
    for step in range(1, 6):
        journal.append({"step": step, "train/loss": float(step)})
    journal.append({"step": 5, "val/loss": 4.5})
    for step in range(4, 8):  # resumed from step 3
        journal.append({"step": step, "train/loss": 10.0 + step})
    live = live_metrics(tmp_path / "m.jsonl")
    assert [(r["step"], r["train/loss"]) for r in live] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 14.0),
        (5, 15.0),
        (6, 16.0),
        (7, 17.0),
    ]
    assert "val/loss" not in live[4], "measured on weights that were given up"


def test_live_metrics_drops_the_steps_of_a_past_that_was_given_up(tmp_path):
    journal = Journal(tmp_path / "m.jsonl")
    for step in (10, 20, 30, 40, 20, 30):
        journal.append({"step": step, "train/loss": 1.0})
    assert [r["step"] for r in live_metrics(tmp_path / "m.jsonl")] == [10, 20, 30]
    assert newest_step(tmp_path / "m.jsonl") == 40
    assert newest_step(tmp_path / "none.jsonl") is None


def test_a_branch_gives_up_what_was_written_from_the_step_on_to_which_the_run_goes_back():
    branch: Branch[str] = Branch()
    for step in (1, 2, 4):
        assert branch.go_to(step) is None
        branch.by_step[step] = f"first {step}"
    assert branch.go_to(4) is None, "a second line of the step"
    assert branch.go_to(4, once=True) == {4: "first 4"}
    assert branch.go_to(2) == {2: "first 2"}
    assert branch.by_step == {1: "first 1"}
    assert branch.go_to(1) == {1: "first 1"}


def test_train_and_val_records_of_a_step_become_one(tmp_path):
    journal = Journal(tmp_path / "m.jsonl")
    journal.append({"step": 5, "train/loss": 1.0})
    journal.append({"step": 5, "val/loss": 2.0})
    assert live_metrics(tmp_path / "m.jsonl") == [{"step": 5, "train/loss": 1.0, "val/loss": 2.0}]


def test_events_carry_utc_and_seconds_since_start(tmp_path):
    now = [1000.0]
    events = Events(tmp_path / "events.jsonl", clock=lambda: now[0])
    events.event("started", world_size=2)
    now[0] += 12.5
    events.event("saved", path=Path("checkpoints/step-10"), text="a\nb\u2028c é")
    (started, saved), broken = read_journal(tmp_path / "events.jsonl")
    assert broken == 0
    assert (started["event"], started["world_size"], started["seconds_since_start"]) == ("started", 2, 0.0)
    assert (saved["path"], saved["text"], saved["seconds_since_start"]) == (
        str(Path("checkpoints/step-10")),
        "a\nb\u2028c é",
        12.5,
    )
    assert started["time"].endswith("+00:00")


def test_an_event_cannot_overwrite_its_own_fields(tmp_path):
    with pytest.raises(ValueError, match="time"):
        Events(tmp_path / "events.jsonl").event("saved", time=3)


def test_two_openers_append_whole_lines(tmp_path):
    path = tmp_path / "e.jsonl"
    a, b = Events(path), Events(path)
    for i in range(20):
        (a if i % 2 else b).event("tick", i=i)
    assert [r["i"] for r in read_journal(path)[0]] == list(range(20))
    assert os.stat(path).st_size == len(path.read_bytes())


def test_digests_are_lines_of_their_own_that_plots_and_dashboards_do_not_see(tmp_path):
    path = tmp_path / "m.jsonl"
    journal = Journal(path)
    for step in (1, 2, 3):
        journal.digest(step, {"loss": 1 / 3, "grad_norm": math.inf})
        if step == 2:
            journal.append({"step": step, "train/loss": 2.0})
    assert live_metrics(path) == [{"step": 2, "train/loss": 2.0}]
    assert newest_step(path) == 2
    assert read_journal(path)[0][0] == {"step": 1, "digest": {"loss": 1 / 3, "grad_norm": "inf"}}
    journal.digest(2, {"loss": 1.0})  # resumed from step 1
    assert live_metrics(path) == []


def test_writing_that_fails_is_said_once_counted_and_said_again_when_it_works(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "e.jsonl"
    events = Events(path)
    original, full = os.write, [False]

    def write(descriptor, data):
        if full[0] and len(data) > 10:
            original(descriptor, bytes(data)[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    for step in range(6):
        full[0] = step in (2, 3)
        events.event("tick", step=step)
    (level, lost), (_, again) = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert level == "WARNING"
    assert lost.startswith(f"lines of {path} cannot be written: [Errno 28] No space left on device; training goes on")
    assert again == f"lines of {path} can be written again; 2 were lost"
    assert [record["step"] for record in read_journal(path)[0]] == [0, 1, 4, 5]


@given(
    steps=st.lists(st.integers(0, 12), max_size=40),
    after=st.integers(0, 14),
    block=st.integers(1, 60),
    torn=st.sampled_from([b"", b'{"step": 3, "train', b"\0" * 9]),
)
@settings(max_examples=300, deadline=None)
def test_what_follows_a_step_is_found_from_the_end(steps, after, block, torn):
    """Whatever the size of the blocks that are read, and with given-up pasts and broken lines in between."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(journal, "_BLOCK", block):
        path = Path(folder, "metrics.jsonl")
        lines = [json.dumps({"step": step, "train/loss": 1.5 * index}) for index, step in enumerate(steps)]
        path.write_bytes("".join(f"{line}\n" for line in lines).encode() + torn)
        last = max((index for index, step in enumerate(steps) if step <= after), default=-1)
        expected = [json.loads(line) for line in lines[last + 1 :]]
        assert [line for line in read_lines(path, after) if line is not None] == expected


def test_a_resume_reads_the_end_of_a_long_journal_only(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with open(path, "w") as file:
        for step in range(1, 100_001):
            file.write(f'{{"step": {step}, "digest": {{"loss": 1.0}}}}\n')
    parsed: list[bytes] = []
    loads = json.loads
    monkeypatch.setattr(journal.json, "loads", lambda line: parsed.append(line) or loads(line))
    assert [line["step"] for line in read_lines(path, 99_990) if line is not None] == list(range(99_991, 100_001))
    assert len(parsed) == 11
    assert newest_step(path) is None
    assert len(parsed) == 11
