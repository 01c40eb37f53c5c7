"""Keys that no schema knows: a likely slip is refused, anything else is said to do nothing."""

from __future__ import annotations

from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from chatgot.config.run import RunConfig
from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.findings import Finding
from chatgot.deepspeed_json.read import Document
from chatgot.deepspeed_json.resolve import build_engine_config, resolve
from chatgot.deepspeed_json.settings import dotted_keys
from tests.deepspeed_json.conftest import GPU, with_keys


def about(changes: dict[str, Any], **more: Any) -> list[Finding]:
    """What is said of VALID with changes, and not of VALID."""
    said = resolve(Document(with_keys(changes)), world_size=1, facts=GPU, **more).findings.all
    return [f for f in said if f.key in changes]


@pytest.mark.parametrize(
    "key",
    [
        *("cuda_visible_devices", "author", "title", "name", "run_name", "foo", "output_dir", "hf_config", "launcher"),
        *("optimizer.origin", "scheduler.origin", "activation_checkpointing.colour", "data_types.origin"),
        *("timers.origin", "flops_and_more", "checkpoint.parallel_write.origin"),
    ],
)
def test_unknown_key_like_no_other_is_a_warning_and_stays_behind(key: str) -> None:
    changes: dict[str, Any] = {"scheduler": {"type": "WarmupLR", "params": {}}} if "scheduler" in key else {}
    tree = with_keys({**changes, key: {"text": "of a person"}})
    DeepSpeedConfig(tree)  # takes it
    (finding,) = (f for f in about({**changes, key: {"text": "of a person"}}) if f.key == key)
    assert (finding.level, finding.why) == ("warning", "no key of DeepSpeed, which ignores it, and so does ChatGoT")
    ours = build_engine_config(tree, "ds.json", world_size=1, facts=GPU)
    assert ours == build_engine_config(with_keys({key: ...}, tree), "ds.json", world_size=1, facts=GPU)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("Gradient_Clipping", "gradient_clipping"),
        ("BF16", "bf16"),
        ("gradient_clip", "gradient_clipping"),
        ("zero_optimize", "zero_optimization"),
        ("stage", "zero_optimization.stage"),
        ("stage3_max_live_parameter", "zero_optimization.stage3_max_live_parameters"),
        ("lr", "optimizer.params.lr"),
        ("weight_deccay", "optimizer.params.weight_decay"),
        ("warmup_num_steps", "scheduler.params.warmup_num_steps"),
        ("keep_last", "chatgot.checkpoint.keep_last"),
        ("schedule", "scheduler"),
        ("optimizer.lr", "optimizer.params.lr"),
        ("optimizer.zero_optimization", "zero_optimization"),
        ("activation_checkpointing.every_n_layers", "chatgot.activation_checkpointing.every_n_layers"),
        ("learning_rate", "optimizer.params.lr"),
        ("micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("mixed_precision", "bf16"),
        ("gradient_checkpointing", "activation_checkpointing"),
    ],
)
def test_likely_slip_is_refused_with_what_was_meant(key: str, meant: str) -> None:
    (finding,) = about({key: 1})
    assert (finding.level, finding.suggestion) == ("error", meant)


@pytest.mark.parametrize(("key", "home"), [("max_steps", "train"), ("d_model", "model"), ("max_step", "train")])
def test_key_of_the_run_yaml_is_sent_there(key: str, home: str) -> None:
    (finding,) = about({key: 8})
    assert finding.level == "error"
    assert finding.suggestion == f"{home}.{key.removesuffix('_step') + '_steps' if key == 'max_step' else key}"
    assert "the run YAML (--config) has it" in finding.message


def test_key_of_several_sections_is_refused() -> None:
    (finding,) = about({"device": "cpu"})
    assert finding.level == "error"
    where = "zero_optimization.offload_param.device or zero_optimization.offload_optimizer.device"
    assert finding.message.endswith(f"it belongs at {where}")
    (finding,) = about({"enabled": True})
    assert finding.message.endswith("it belongs at fp16.enabled or bf16.enabled or torch_autocast.enabled or elsewhere")


def test_keys_of_the_run_yaml_are_known_here() -> None:
    assert set(schema.RUN_KEYS) == set(dotted_keys(RunConfig))


@pytest.mark.parametrize(
    "key", ["_comment", "//", "_note", "__doc", "// stage", "_optimizer_comment", "_model", "$schema", "#"]
)
@pytest.mark.parametrize(
    "section", ["", "optimizer.", "activation_checkpointing.", "timers.", "chatgot.", "chatgot.checkpoint."]
)
def test_comment_is_a_note_where_deepspeed_takes_it(section: str, key: str) -> None:
    tree = with_keys({section + key: "of a person"})
    DeepSpeedConfig(tree)
    (finding,) = about({section + key: "of a person"})
    assert (finding.level, finding.why) == ("note", "a comment: DeepSpeed ignores it, and so does ChatGoT")
    ours = build_engine_config(tree, "ds.json", world_size=1, facts=GPU)
    assert "of a person" not in str(ours.to_dict())


def test_comment_is_refused_where_deepspeed_refuses_it() -> None:
    for key in ("zero_optimization._comment", "bf16.//", "optimizer.params._comment"):
        assert [f.level for f in about({key: "text"})] == ["error"]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("_zero_optimization", "zero_optimization"),
        ("_zero_optimisation", "zero_optimization"),
        ("__gradient_clipping", "gradient_clipping"),
        ("optimizer._type", "type"),
        ("chatgot._schedule", "schedule"),
        ("chatgot.guard._on_diverge", "on_diverge"),
        ("_overlap_comm", "zero_optimization.overlap_comm"),
    ],
)
def test_underscore_before_a_known_key_is_a_slip(key: str, meant: str) -> None:
    (finding,) = about({key: 1})
    assert (finding.level, finding.suggestion) == ("error", meant)


def test_unknown_key_of_an_override_is_refused() -> None:
    tree = with_keys({})
    found = resolve(Document(tree), {"author": "x"}, world_size=1, facts=GPU).findings.at_level("error")
    assert [finding.key for finding in found] == ["author"]
