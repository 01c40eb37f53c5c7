"""What is run differently from the letter: the value in use, what DeepSpeed gets, and the line that says so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from chatgot.deepspeed_json.check import check
from chatgot.deepspeed_json.read import shipped_jsons
from chatgot.deepspeed_json.resolve import EngineConfig, build_engine_config
from chatgot.devices import DeviceFacts
from tests.deepspeed_json.conftest import CPU, GPU, OLD_GPU, VALID, with_keys

ZERO = "zero_optimization"
MICRO, TOTAL, ACCUMULATION = "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"
ADAMW = json.loads(shipped_jsons()["bf16_zero1"].read_text(encoding="utf-8"))["optimizer"]


def adapted(config: EngineConfig) -> dict[str, str]:
    return {one.key: one.why for one in config.findings if one.level == "adapted"}


def value(tree: dict[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree[key]
    return tree


CASES: list[tuple[dict[str, Any], DeviceFacts, dict[str, Any], dict[str, str]]] = [
    # 16 bit at stage 0
    ({"bf16.enabled": True, ZERO: ...}, GPU, {f"{ZERO}.stage": 1}, {f"{ZERO}.stage": "bf16 runs at ZeRO stage 1"}),
    ({"fp16.enabled": True, f"{ZERO}.stage": 0}, GPU, {f"{ZERO}.stage": 1}, {f"{ZERO}.stage": "fp16 runs at"}),
    ({"bfloat16.enabled": True, ZERO: False}, GPU, {f"{ZERO}.stage": 1}, {f"{ZERO}.stage": "bf16 runs at"}),
    ({"bf16.enabled": "auto", ZERO: {}}, GPU, {f"{ZERO}.stage": 1}, {f"{ZERO}.stage": "bf16 runs at"}),
    ({"fp16.enabled": True, ZERO: ..., "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, GPU,
     {f"{ZERO}.stage": 1, "zero_allow_untested_optimizer": True}, {f"{ZERO}.stage": "fp16 runs at"}),
    # no optimizer
    ({"optimizer": ...}, GPU, {"optimizer": ADAMW}, {"optimizer": f'paste "optimizer": {json.dumps(ADAMW)}'}),
    ({"optimizer": ...}, CPU, {"optimizer": ADAMW}, {"optimizer": "that of fp32_zero0.json"}),
    # "auto" that transformers fills in
    ({"gradient_clipping": "auto"}, GPU, {"gradient_clipping": 1.0}, {}),
    ({"optimizer.params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}},
     GPU, {"optimizer.params.lr": 6e-4, "optimizer.params.betas": [0.9, 0.95], "optimizer.params.weight_decay": 0.1},
     {"optimizer.params.lr": "as in bf16_zero1.json", "optimizer.params.weight_decay": "0.1, as in"}),
    ({"optimizer": {"type": "Adagrad", "params": {"lr": "auto"}}}, GPU, {},
     {"optimizer.params.lr": "the default of Adagrad"}),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                                                   "warmup_num_steps": "auto"}}}, GPU,
     {"scheduler.params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-3, "warmup_num_steps": 100}},
     {"scheduler.params.warmup_max_lr": "the optimizer's lr", "scheduler.params.warmup_num_steps": "100, as in",
      "scheduler.params.warmup_min_lr": "0.0, DeepSpeed's default"}),
    # what DeepSpeed ignores
    ({f"{ZERO}.offload_param": {"device": "cpu"}}, GPU, {f"{ZERO}.offload_param.device": "none"},
     {f"{ZERO}.offload_param.device": "works from ZeRO stage 3 on, and the stage is 1"}),
    ({ZERO: {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, GPU, {f"{ZERO}.offload_optimizer.device": "none"},
     {f"{ZERO}.offload_optimizer.device": "the stage is 0"}),
    ({ZERO: {"cpu_offload": True, "cpu_offload_param": True}}, GPU, {f"{ZERO}.cpu_offload": False},
     {f"{ZERO}.cpu_offload": "stage is 0", f"{ZERO}.cpu_offload_param": "stage is 0"}),
    ({"checkpoint.load_universal": True}, GPU, {"checkpoint.load_universal": False},
     {"checkpoint.load_universal": "takes any checkpoint to any ranks"}),
    ({"data_efficiency": {"enabled": True, "data_routing": {"enabled": True, "random_ltd": {"enabled": True}}}}, GPU,
     {"data_efficiency.enabled": False}, {"data_efficiency.enabled": "only in layers that a program wraps itself"}),
    ({"activation_checkpointing": {"partition_activations": True, "contiguous_memory_optimization": True}}, GPU, {},
     {"activation_checkpointing.contiguous_memory_optimization": "the number of recomputed blocks"}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "facts", "values", "said"), CASES, ids=range(len(CASES)))
def test_it_runs_and_says_how(
    read: Callable[..., EngineConfig],
    tmp_path: Path,
    changes: dict[str, Any],
    facts: DeviceFacts,
    values: dict[str, Any],
    said: dict[str, str],
) -> None:
    config = read(changes, facts=facts)
    assert {dotted: value(config.deepspeed, dotted) for dotted in values} == values
    found = adapted(config)
    assert all(words in found[key] for key, words in said.items()), found
    DeepSpeedConfig(config.deepspeed)
    for key, words in said.items():  # at the start once, and in check
        assert sum(words in note and re.search(rf"{key}( =|:)", note) is not None for note in config.notes) == 1, (
            config.notes
        )
    report = check(str(tmp_path / "ds.json"), world_size=1, facts=facts)
    assert report.exit_code == 0
    assert {one.key for one in report.findings if one.level == "adapted"} == set(found)
    effective = {one.key: (one.value, one.source) for one in report.effective()}
    for dotted, used in values.items():
        if not isinstance(used, dict):
            assert effective.get(dotted, (used, "adapted")) in ((used, "adapted"), (used, "derived"))
    assert {source for key, (_, source) in effective.items() if key in found} <= {"adapted", "file"}
    stored = build_engine_config(config.to_dict(), "stored", world_size=1, facts=facts)
    assert stored == config
    assert not {one.key for one in stored.findings if one.level == "adapted"} - {
        "activation_checkpointing.contiguous_memory_optimization"
    }


@pytest.mark.parametrize(
    ("total", "micro", "accumulation", "ranks", "batch"),
    [
        ("auto", "auto", "auto", 1, (32, 4, 8)),
        ("auto", "auto", "auto", 4, (32, 4, 2)),
        ("auto", "auto", "auto", 3, (12, 4, 1)),
        ("auto", "auto", "auto", 16, (64, 4, 1)),
        ("auto", 2, "auto", 1, (32, 2, 16)),
        ("auto", "auto", 3, 2, (24, 4, 3)),
        (..., "auto", 1, 2, (8, 4, 1)),
        ("auto", 5, ..., 1, (5, 5, 1)),
        (24, ..., "auto", 2, (24, 12, 1)),
        (24, 3, "auto", 2, (24, 3, 4)),
    ],
)
def test_batch_numbers_that_are_auto(
    read: Callable[..., EngineConfig], total: Any, micro: Any, accumulation: Any, ranks: int, batch: tuple[int, ...]
) -> None:
    base = {TOTAL: total, MICRO: micro, ACCUMULATION: accumulation}
    tree = with_keys({key: value for key, value in base.items() if value is not ... or key in VALID})
    config = build_engine_config(tree, "ds.json", world_size=ranks, facts=GPU)
    assert (config.train_batch_size, config.micro_batch_size, config.accumulation) == batch
    if ranks == 1:  # as this process is
        assert DeepSpeedConfig(config.deepspeed).train_batch_size == batch[0]


def test_a_micro_batch_for_memory_to_decide_stays_open(read: Callable[..., EngineConfig]) -> None:
    for accumulation in ("auto", ...):
        config = read({MICRO: "auto", **({} if accumulation is ... else {ACCUMULATION: accumulation})})
        assert any("found by real steps" in note for note in config.notes)


def test_auto_in_a_section_that_drops_it_is_the_default(read: Callable[..., EngineConfig]) -> None:
    zero = {"stage": 3, "sub_group_size": "auto", "stage3_param_persistence_threshold": "auto", "offload_param": "auto",
            "stage3_max_live_parameters": "auto", "overlap_comm": "auto"}  # fmt: skip
    tree = with_keys({ZERO: zero, "fp16": {"enabled": "auto", "loss_scale": "auto"}, "wandb.enabled": "auto"})
    config = build_engine_config(tree, "ds.json", world_size=1, facts=OLD_GPU)
    used, stock = config.deepspeed, DeepSpeedConfig({**VALID, ZERO: zero}).zero_config
    assert used[ZERO]["sub_group_size"] == stock.sub_group_size
    assert used[ZERO]["stage3_param_persistence_threshold"] == stock.param_persistence_threshold
    assert used[ZERO]["stage3_max_live_parameters"] == stock.max_live_parameters
    assert used["fp16"] == {"enabled": True, "loss_scale": 0.0}
    assert config.offload_param == "none"
    assert sum('"auto", DeepSpeed\'s default' in note for note in config.notes) == 7
    assert "auto" not in json.dumps(used)


def test_the_length_of_the_run_fills_in_total_num_steps() -> None:
    from chatgot.deepspeed_json.read import Document
    from chatgot.deepspeed_json.resolve import resolve

    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": 2}}
    found = resolve(Document(with_keys({"scheduler": scheduler})), world_size=1, facts=GPU)
    assert found.complete(max_steps=70).engine_config().deepspeed["scheduler"]["params"]["total_num_steps"] == 70


def test_bf16_inside_autocast_is_passed_on_with_a_warning(read: Callable[..., EngineConfig]) -> None:
    config = read({"bf16.enabled": True, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}})
    assert config.precision == "bf16"
    assert [one.level for one in config.findings if one.key == "torch_autocast.enabled"] == ["warning"]


def test_an_optimizer_that_is_not_given_fits_what_is_offloaded(read: Callable[..., EngineConfig]) -> None:
    config = read({"optimizer": ..., ZERO: {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}})
    of_deepspeed = {key: value for key, value in ADAMW["params"].items() if key not in ("torch_adam", "fused")}
    assert config.deepspeed["optimizer"] == {**ADAMW, "params": of_deepspeed}
    assert config.cpu_adam_key == f"{ZERO}.offload_optimizer.ratio"
    plain = read({"optimizer": ..., ZERO: {"stage": 3, "offload_optimizer": {"device": "cpu"}}})
    assert plain.deepspeed["optimizer"] == ADAMW


def test_a_misspelled_optimizer_is_not_replaced(refused: Callable[..., list[str]]) -> None:
    (line,) = refused({"optimizer": ..., "optimizr": {"type": "SGD"}})
    assert "did you mean 'optimizer'?" in line
