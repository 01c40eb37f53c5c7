"""Which steps fed which samples, against brute force over the data order and against what really trained."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict

import numpy as np
import pytest

from chatgot.data.loader import DataOrder
from chatgot.errors import ConfigError
from chatgot.proof.digest import batches_id
from chatgot.proof.fed import Fed, Feed, Order

DATA = "d" * 64
TOKENS = 5000
ORDER = Order(0, 8, 1337, 16, DATA)


def event(kind: str, **fields) -> dict:
    return {"event": kind, "time": "", "seconds_since_start": 0.0, **fields}


def begun(kind: str, step: int, **changes) -> dict:
    return event(kind, step=step, data_order={**asdict(ORDER), **changes})


@pytest.fixture
def write(tmp_path):
    """Make a run folder of these events."""

    def folder(events: list[dict], name: str = "run", settings: bool = True):
        run = tmp_path / name
        run.mkdir()
        (run / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
        (run / "run.yaml").write_text("model: {max_seq_length: 16}\ntrain: {seed: 1337}\n")
        (run / "ds_config.json").write_text('{"train_batch_size": 8}')
        (run / "environment.json").write_text(json.dumps({"data": {"spec": "x", "fingerprint": DATA}}))
        return run

    return folder


EVENTS = [
    begun("started", 0),
    event("saved", step=20, tag="step-20"),
    begun("resumed", 20, next_sample=160),  # killed, and no step is lost
    event("saved", step=60, tag="step-60"),
    begun("resumed", 40, next_sample=320, train_batch_size=12),  # from an older checkpoint, with another batch
    event("rolled_back", from_step=70, to_step=50, first_sample=440, samples=240),
    event("saved", step=50, tag="step-50"),
    begun("resumed", 90, next_sample=1160, train_batch_size=12),
]
"""Steps 1..40 of 8 samples, 41..50 of 12, 20 steps left out by a rollback, and on from sample 680."""


def fed_by_hand(last: int) -> dict[int, range]:
    """Step -> its samples."""
    samples = {step: range((step - 1) * 8, step * 8) for step in range(1, 41)}
    samples |= {step: range(320 + (step - 41) * 12, 320 + (step - 40) * 12) for step in range(41, 51)}
    samples |= {step: range(680 + (step - 51) * 12, 680 + (step - 50) * 12) for step in range(51, last + 1)}
    return samples


def test_positions_are_fed_where_brute_force_finds_them(write):
    """1,000 random passages, over several epochs, a changed batch, a rollback and resumes."""
    feed, samples, order = Feed.of(write(EVENTS), 120), fed_by_hand(120), DataOrder(TOKENS, 16, 1337)
    starts = order.starts(np.concatenate([np.array(indices) for indices in samples.values()]))
    steps = np.repeat(list(samples), [len(indices) for indices in samples.values()])
    assert order.samples_per_epoch * 3 < samples[120][-1]
    for step, indices in samples.items():
        stretch = feed.at(step)
        assert stretch is not None
        assert stretch.sample_of(step) == indices[0]
    rng, wholes, parts = random.Random(1), 0, 0
    for _ in range(1000):
        begin = rng.randrange(TOKENS)
        end = min(TOKENS, begin + rng.randint(1, 30))
        whole = set(steps[(starts <= begin) & (starts + 17 >= end)].tolist())
        any_of_it = set(steps[(starts < end) & (starts + 17 > begin)].tolist())
        fed = feed.fed(DATA, TOKENS, begin, end)
        assert fed.whole == tuple(sorted(whole))
        assert fed.part == tuple(sorted(any_of_it - whole))
        wholes, parts = wholes + len(whole), parts + len(fed.part)
    assert min(wholes, parts) > 1000
    assert feed.fed("e" * 64, TOKENS, 0, TOKENS) == feed.fed(DATA, TOKENS, 5, 5)  # nothing, both


def test_a_checkpoint_knows_what_had_been_fed_when_it_was_saved(write):
    run = write(EVENTS)
    before = Feed.of(run, 60, "step-60").stretches
    assert [(one.first_step, one.last_step, one.first_sample) for one in before] == [(1, 60, 0)]
    assert Feed.of(run, 50, "step-50").stretches[-1].first_sample == 320
    assert Feed.of(run, 50, "step-50").at(51) is None
    assert Feed.of(run, 100, "step-77").at(100) is not None  # not in the record: the run as it stands


def test_a_run_that_began_with_another_runs_checkpoint_was_fed_what_that_one_was(write, tmp_path):
    other = write([begun("started", 0), event("saved", step=30, tag="t"), event("saved", step=40, tag="u")], "other")
    run = write([{**begun("resumed", 30, next_sample=240, run=str(other)), "from": f"{other}/checkpoints/t"}])
    assert [(one.first_step, one.last_step) for one in Feed.of(run, 50).stretches] == [(1, 50)]
    shutil.move(other, tmp_path / "gone")
    feed = Feed.of(run, 50)
    assert feed.unknown(DATA) == [f"steps 1..30 are of {other}, whose events cannot be read here"]
    assert feed.fed(DATA, TOKENS, 0, TOKENS).part[0] == 31


def test_events_of_an_earlier_version_tell_as_much_as_is_certain(write):
    """Their order follows from the settings where the setup's hash proves these, and nothing has moved the position."""

    def old(kind: str, step: int, batch: int = 8) -> dict:
        return event(kind, step=step, setup={"batches": batches_id(DATA, 1337, batch, 16)})

    rolled = event("rolled_back", from_step=30, to_step=25, first_sample=200, samples=40)
    feed = Feed.of(write([old("started", 0), old("resumed", 20), rolled]), 40)
    assert [(one.first_step, one.last_step, one.first_sample) for one in feed.stretches] == [
        (1, 25, 0),
        (26, 40, 240),
    ]
    assert feed.unknown(DATA) == []
    for name, events in {
        "other settings": [old("started", 0, batch=16)],
        "after a rollback": [old("started", 0), rolled, old("resumed", 35)],
        "no setup": [event("started", step=0)],
    }.items():
        feed = Feed.of(write(events, name), 40)
        assert len(feed.unknown(DATA)) == 1, name
        assert "recorded by an earlier ChatGoT" in feed.unknown(DATA)[0]


def test_what_is_said_of_the_steps():
    assert str(Fed((118, 402), (3, 4, 731))) == "fed in steps 118, 402 and in part in 3 others"
    assert str(Fed((), (731,))) == "fed in part in step 731"
    assert str(Fed(tuple(range(1, 45)))) == "fed in steps 1, 2, 3, 4, 5, 6 and 38 more (up to 44)"
    assert str(Fed()) == "not fed so far"
    assert str(Fed(all_known=False)) == "steps not known"
    assert str(Fed((7,), (8,), False)) == "fed in step 7 and in part in 1 other; other steps are not known"


def test_another_text_is_said(write):
    feed = Feed.of(write([begun("started", 0, data="e" * 64), begun("resumed", 10, next_sample=80)]), 20)
    assert feed.unknown(DATA) == ["steps 1..10 had another text"]
    assert feed.fed(DATA, TOKENS, 0, TOKENS).part[0] == 11


def test_damaged_events_are_no_crash_and_no_answer(write, tmp_path):
    bad = [event("started"), event("rolled_back", to_step=3), event("resumed", step=5, data_order={"next_sample": "x"})]
    feed = Feed.of(write(bad), 10)
    assert [one.order for one in feed.stretches] == [None, None]
    with pytest.raises(ConfigError, match="not a run folder"):
        Feed.of(tmp_path, 10)
