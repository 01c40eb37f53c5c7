"""What may be compared of two starts of a run, and how nearly."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict

import pytest

from chatgot.observe.journal import Journal
from chatgot.proof import digest
from chatgot.proof.digest import (
    Digest,
    Setup,
    first_difference,
    terms,
)

TOPOLOGY = {
    "world_size": 2,
    "zero_stage": 0,
    "precision": "fp32",
    "micro_batch": 4,
    "device": "cpu AVX512",
    "threads": 1,
    "layout": "x",
}
SETUP = Setup(id="aa", numbers="n1", batches="b1", dropout=False, deterministic=True, topology=TOPOLOGY)
DIGEST = Digest(batch="b", loss=1.5, grad_norm=0.25, lr=1e-3, rng="r", setup="aa")


def other(**changes) -> Setup:
    plain = {key: changes.pop(key) for key in list(changes) if key not in TOPOLOGY}
    return dataclasses.replace(SETUP, id="bb", topology={**TOPOLOGY, **changes}, **plain)


@pytest.mark.parametrize(
    ("field", "value"), [("batch", "c"), ("rng", "s"), ("lr", 1.1e-3), ("loss", 1.5 + 1e-15), ("grad_norm", None)]
)
def test_the_same_setup_is_compared_bit_for_bit(field, value):
    by = terms(SETUP, SETUP)
    assert by.exact
    assert first_difference(DIGEST, DIGEST, by, 1) is None
    found = first_difference(DIGEST, dataclasses.replace(DIGEST, **{field: value}), by, 1)
    assert found is not None
    assert found.field == field


def test_not_a_number_repeats_itself():
    lost = dataclasses.replace(DIGEST, loss=math.nan)
    assert first_difference(lost, dataclasses.replace(lost), terms(SETUP, SETUP), 1) is None


def test_the_cause_is_named_before_its_effect():
    found = first_difference(DIGEST, dataclasses.replace(DIGEST, loss=9.0, rng="s"), terms(SETUP, SETUP), 1)
    assert found is not None
    assert found.field == "rng"


@pytest.mark.parametrize(
    ("now", "exactly", "nearly"),
    [
        (other(zero_stage=3), {"batch", "rng", "lr"}, {"loss", "grad_norm"}),
        (other(zero_stage=3, dropout=True), {"batch", "rng", "lr"}, {"loss", "grad_norm"}),
        (other(world_size=1), {"batch", "lr"}, {"loss", "grad_norm"}),
        (other(world_size=1, dropout=True), {"batch", "lr"}, set()),
        (other(micro_batch=2, dropout=True), {"batch", "lr"}, set()),
        (other(numbers="n2"), {"batch"}, set()),
        (other(numbers="n2", batches="b2"), set(), set()),
        (other(deterministic=False), {"batch", "rng", "lr"}, {"loss", "grad_norm"}),
        (None, {"batch"}, set()),
    ],
)
def test_what_is_compared_follows_from_what_changed(now, exactly, nearly):
    by = terms(SETUP, now)
    assert (set(by.exactly), set(by.nearly)) == (exactly, nearly)
    assert by.why


def test_roundings_are_allowed_for_in_the_first_steps_and_not_compared_later():
    by = terms(SETUP, other(world_size=1))
    drifted = dataclasses.replace(DIGEST, loss=1.5 * (1 + 3e-5))
    found = first_difference(DIGEST, drifted, by, 1)
    assert found is not None
    assert not found.proves, "roundings can be larger than usual"
    assert first_difference(DIGEST, drifted, by, 4) is None
    lost = dataclasses.replace(DIGEST, loss=2.0, grad_norm=9.0)
    assert first_difference(DIGEST, lost, by, digest.FIRST_STEPS) is not None
    assert first_difference(DIGEST, lost, by, digest.FIRST_STEPS + 1) is None
    assert terms(SETUP, other(precision="bf16")).tolerance == digest.TOLERANCE_16_BIT


@pytest.mark.parametrize(("field", "value"), [("batch", "c"), ("lr", 1.1e-3), ("rng", "s")])
@pytest.mark.parametrize("steps", [1, 10**6])
def test_what_no_rounding_changes_is_compared_at_any_step(field, value, steps):
    found = first_difference(
        DIGEST, dataclasses.replace(DIGEST, **{field: value}), terms(SETUP, other(micro_batch=2)), steps
    )
    assert found is not None
    assert (found.field, found.proves) == (field, True)


def test_the_rate_of_a_stock_scheduler_follows_the_steps_that_fp16_skipped():
    """Other layouts can skip other steps."""
    fp16 = {"precision": "fp16", "skips_delay_lr": True}
    before = dataclasses.replace(SETUP, topology={**TOPOLOGY, **fp16})
    now = dataclasses.replace(SETUP, topology={**TOPOLOGY, **fp16, "micro_batch": 2})
    assert set(terms(before, now).exactly) == {"batch", "rng"}
    assert terms(before, before).exact


def test_a_step_that_only_one_of_two_starts_skipped_parts_them():
    skipped = dataclasses.replace(DIGEST, grad_norm=math.inf)
    by = terms(SETUP, other(precision="bf16"))
    assert digest.after(DIGEST, dataclasses.replace(DIGEST, grad_norm=None), by) == by
    assert digest.after(skipped, skipped, by) == by
    apart = digest.after(DIGEST, skipped, by)
    assert (set(apart.exactly), apart.nearly) == ({"batch", "rng", "lr"}, ())


def test_steps_have_no_more_in_common_than_those_before_them():
    exact, near = terms(SETUP, SETUP), terms(SETUP, other(world_size=1))
    changed = terms(SETUP, other(numbers="n2"))
    assert exact.narrowed(exact) == exact
    assert near.narrowed(exact) == near
    assert near.narrowed(near).nearly == near.nearly
    assert set(exact.narrowed(near).exactly) == {"batch", "lr"}
    assert (near.narrowed(changed).exactly, near.narrowed(changed).nearly) == (("batch",), ())
    assert not exact.narrowed(changed).exact


def test_digests_and_setups_survive_their_files(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.digest(1, DIGEST.to_json())
    strange = dataclasses.replace(DIGEST, loss=math.inf, grad_norm=None)
    journal.digest(2, strange.to_json())
    journal.digest(3, {"batch": "no more than this"})
    assert digest.history(tmp_path).digests == {1: DIGEST, 2: strange}
    assert digest.history(tmp_path, after=1).digests == {2: strange}
    assert digest.setups([{"setup": asdict(SETUP)}, {"setup": {"id": "old"}}, {"event": "saved"}, None]) == {
        "aa": SETUP
    }


def test_history_is_the_latest_branch(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    for step, lr in [(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.1), (2, 0.2), (3, 0.2)]:
        journal.digest(step, dataclasses.replace(DIGEST, lr=lr).to_json())
    assert {step: found.lr for step, found in digest.history(tmp_path).digests.items()} == {1: 0.1, 2: 0.2, 3: 0.2}
