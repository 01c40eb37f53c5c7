"""What DeepSpeed rejects, check rejects; what trains, check does not reject."""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hjson
import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.check import Report, check
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.deepspeed_json.schema import Key, Section
from tests.deepspeed_json.conftest import (
    CPU,
    GPU,
    VALID,
    with_keys,
)
from tests.support import engine_json, read_engine_config

HERE = Path(__file__).parent
SHIPPED = sorted((HERE.parents[1] / "ds_configs").glob("*.json"))
STOCK = sorted((HERE / "stock").glob("*.json"))
REJECTED = (
    AssertionError,
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    IndexError,
    ArithmeticError,
    hjson.HjsonDecodeError,
)
"""pydantic's ValidationError and DeepSpeedConfigError are ValueErrors or Exceptions of DeepSpeed's own, see
`deepspeed_rejects`.
"""
WRONG = (None, True, -1, 0, 1.5, 3, "x", "auto", [], {}, {"x": 1})


def deepspeed_rejects(configuration: Any) -> bool:
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        DeepSpeedConfig(copy.deepcopy(configuration))
    except (*REJECTED, DeepSpeedConfigError):
        return True
    return False


def looked_at(tmp_path: Path, tree: dict[str, Any] | str, **more: Any) -> Report:
    path = tmp_path / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return check(str(path), **{"world_size": 1, "facts": GPU, **more})


def generated() -> Iterator[dict[str, Any]]:
    """VALID with one wrong value, one unknown key or one removed key, for every key and section that DeepSpeed
    knows.
    """
    for dotted, node in schema.NODES.items():
        if dotted.startswith("chatgot"):
            continue
        base = {"optimizer": {"type": "AdamW"}} if dotted.startswith("optimizer.") else {}
        for value in WRONG:
            if isinstance(node, Key) and node.auto and value == "auto":
                continue  # resolved before DeepSpeed sees it
            if isinstance(node, Key) or not isinstance(value, dict):
                yield with_keys({**base, dotted: value})
        if isinstance(node, Section):
            yield with_keys({**base, f"{dotted}.unknown_to_anyone": 1})
    for dotted in schema.REMOVED:
        yield with_keys({dotted: {"enabled": False}})
    for total, micro, accumulation in itertools.product((None, 7, 8), (None, 2, 3), (None, 2, 5)):
        numbers = {
            "train_batch_size": total,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
        }
        yield with_keys({name: ... for name in numbers if name in VALID}) | {
            n: v for n, v in numbers.items() if v is not None
        }
    yield with_keys({"bf16.enabled": True, "fp16.enabled": True})


def test_whatever_deepspeed_rejects_check_rejects(tmp_path: Path) -> None:
    rejected, accepted_here = 0, []
    for tree in generated():
        if deepspeed_rejects(tree):
            rejected += 1
            if looked_at(tmp_path, tree, facts=CPU).exit_code != 2:
                accepted_here.append(tree)
    assert not accepted_here, f"{len(accepted_here)} of {rejected}: {accepted_here[:3]}"
    assert rejected > 1500, f"only {rejected} configurations that DeepSpeed rejects"


def test_auto_that_is_resolved_reaches_deepspeed_as_a_value() -> None:
    for changes in (
        {"gradient_accumulation_steps": "auto"},
        {"train_batch_size": "auto", "gradient_accumulation_steps": 2},
    ):
        assert deepspeed_rejects(with_keys(changes))
        ours = build_engine_config(with_keys(changes), "ds.json", world_size=1, facts=GPU)
        assert DeepSpeedConfig(ours.deepspeed).gradient_accumulation_steps == 2


TEXTS = (
    *(
        '{"train_batch_size": 8',
        '{"train_batch_size" 8}',
        '{"train_batch_size": 8, "train_batch_size": 8}',
        '{"a": "b',
        '{"a": [1, 2}',
    ),
    *(
        '{"bf16": {"enabled": true, "enabled": true}, "train_batch_size": 8}',
        '{"train_batch_size": }',
        "{train batch: 8}",
        "[1, 2]",
        "{]",
    ),
    *('{"train_batch_size": 8} x', '"train_batch_size"', '{"train_batch_size": 1e999}', '{"a": "\\q"}', '{"a": "\n"}'),
)


@pytest.mark.parametrize("text", TEXTS)
def test_whatever_hjson_rejects_check_rejects(tmp_path: Path, text: str) -> None:
    report = looked_at(tmp_path, text)
    with pytest.raises(REJECTED):
        DeepSpeedConfig(str(tmp_path / "ds.json"))
    assert report.exit_code == 2
    said = {
        finding.why.partition(":")[0].partition(" in ")[0].partition(" {")[0]
        for finding in report.findings
        if finding.level == "error"
    }
    assert said & {"not valid JSON", "given twice", "expected a JSON object"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_shipped_json_has_no_error_and_no_warning(path: Path, ranks: int) -> None:
    report = check(str(path), world_size=ranks, facts=GPU, n_params=14_000_000)
    notes = {"bf16_zero3": "nobody to share with" if ranks == 1 else "", "fp16_zero2": "needs no loss scaling"}
    notes["fp32_zero0_muon"] = "gradient_clipping is for the AdamW groups only"
    assert [
        f.message
        for f in report.findings
        if f.level not in ("note", "adapted") or not notes.get(path.stem) or notes[path.stem] not in f.message
    ] == []


def verdict(path: Path) -> tuple[str, set[str], set[str]]:
    """What the file's first line says of it: accepted, adapted or refused, by which keys, and which warnings are fine.

    `// adapted: optimizer zero_optimization.stage; warned: scheduler.type`
    """
    said, _, warned = path.read_text().partition("\n")[0].removeprefix("// ").partition("; warned: ")
    kind, _, keys = said.partition(": ")
    return kind, set(keys.split()), set(warned.split())


@pytest.mark.parametrize("path", STOCK, ids=lambda path: path.stem)
def test_json_after_a_public_pattern_has_the_verdict_that_it_states(path: Path) -> None:
    kind, keys, warned = verdict(path)
    report = check(str(path), world_size=1, facts=GPU, n_params=124_000_000)
    found = {level: {f.key for f in report.findings if f.level == level} for level in ("error", "adapted", "warning")}
    assert found["error"] == (keys if kind == "refused" else set())
    if kind == "refused":
        return
    assert found["adapted"] == (keys if kind == "adapted" else set())
    assert found["warning"] <= warned
    assert not deepspeed_rejects(str(path)) or '"auto"' in path.read_text()
    ours = read_engine_config(path, world_size=1, facts=GPU, n_params=124_000_000)
    assert not deepspeed_rejects(ours.deepspeed)
    stored = build_engine_config(ours.to_dict(), "ds_config.json", world_size=1, facts=GPU, n_params=124_000_000)
    assert stored == ours, "the run folder's JSON reads back to something else"
    # The model decides the one, the engine the other (which gradients are clipped): no value of the JSON says it.
    unstated = {"activation_checkpointing.contiguous_memory_optimization", "optimizer.type"}
    still = {f.key for f in stored.findings if f.level == "adapted"}
    assert still <= unstated, "what is adapted once is stated in the run folder"


def test_jsons_after_public_patterns_are_many_and_of_all_verdicts() -> None:
    kinds = Counter(verdict(path)[0] for path in STOCK)
    assert kinds.keys() == {"accepted", "adapted", "refused"}
    assert min(kinds.values()) >= 15, kinds
    assert kinds.total() >= 60, kinds


TRAINED: list[dict[str, Any]] = [
    *(
        engine_json(stage=stage, precision=precision, offload=offload, batch=batch)
        for stage, precision, offload, batch in itertools.product(
            (0, 1, 2, 3), ("fp32", "bf16"), (False, True), (8, 32)
        )
        if not (stage == 0 and (offload or precision == "bf16"))
    ),
    engine_json(stage=3, offload_param=True),
    engine_json(stage=0, precision="autocast_bf16"),
    engine_json(stage=2, precision="autocast_bf16", activation_checkpointing={}),
    engine_json(stage=1, activation_checkpointing={"partition_activations": True}),
    engine_json(stage=1, optimizer={"type": "Muon", "params": {"muon_lr": 0.02, "adam_lr": 1e-3}}),
    engine_json(stage=0, optimizer={"type": "SGD", "params": {"lr": 0.1}}),
    engine_json(chatgot={"schedule": None}, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 2}}),
]
"""Configurations of the kind that tests/distributed and tests/engine train with."""


@pytest.mark.parametrize("tree", TRAINED, ids=range(len(TRAINED)))
def test_what_trains_is_not_rejected(tmp_path: Path, tree: dict[str, Any]) -> None:
    for ranks in (1, 2):
        report = looked_at(tmp_path, tree, world_size=ranks, facts=CPU, n_params=30_000)
        assert [f.text for f in report.findings if f.level == "error"] == []


def test_deepspeed_still_ignores_what_only_check_sees() -> None:
    """The control: without check nobody would hear of these."""
    for changes in (
        {"gradient_cliping": 1.0},
        {"gradient_clipping": "one"},
        {"optimizer.type": "AdamX"},
        {"steps_per_print": 0},
    ):
        assert not deepspeed_rejects(with_keys(changes)), f"DeepSpeed now refuses {changes}"
    assert DeepSpeedConfigModel.model_config.get("extra") == "forbid"
