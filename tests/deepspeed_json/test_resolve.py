"""Reading, checking and resolving the DeepSpeed JSON."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from chatgot.deepspeed_json.resolve import (
    OptimizerConfig,
    WandbConfig,
    build_engine_config,
)
from chatgot.errors import ConfigError
from tests.deepspeed_json.conftest import (
    CPU,
    GPU,
    OLD_GPU,
    VALID,
    with_keys,
)
from tests.support import read_engine_config

# --- the file ---


def test_missing_file_folder_and_empty_file_are_named(tmp_path: Path, refused) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: no such file"):
        read_engine_config(tmp_path / "nowhere.json", world_size=1, facts=GPU)
    with pytest.raises(ConfigError, match="is a folder"):
        read_engine_config(tmp_path, world_size=1, facts=GPU)
    assert refused(" \n") == ["ds.json: empty file, expected a JSON object {...}"]
    assert refused("[1, 2]") == ["ds.json: expected a JSON object {...}, got list"]


@pytest.mark.parametrize(
    ("text", "place", "line", "column"),
    [
        (
            '{\n  "train_batch_size": 8,\n  "bf16": {"enabled": tru, "x": 1}\n}',
            "3",
            '  "bf16": {"enabled": tru, "x": 1}',
            23,
        ),
        ('{"a": [1, 2}', "1", '{"a": [1, 2}', 12),
        ('{\n  "a": 1 "b": 2}', "2", '  "a": 1 "b": 2}', 10),
        ('{\n  # a comment\n  "a": {"b": 1,}, "c": }', "3", '  "a": {"b": 1,}, "c": }', 24),
        ('{"a": 1', "1", '{"a": 1', 8),
    ],
)
def test_syntax_error_points_at_the_spot(refused, text: str, place: str, line: str, column: int) -> None:
    message, shown, caret = refused(text)
    assert message.startswith(f"ds.json:{place}:{column}: not valid JSON: ")
    assert shown == "    " + line
    assert caret == "    " + " " * (column - 1) + "^"


def test_what_hjson_allows_is_allowed(read) -> None:
    text = """{
      // comments, unquoted keys, trailing commas: DeepSpeed reads them
      train_batch_size: 8,
      "train_micro_batch_size_per_gpu": 4,  # two passes
      "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8,},
      optimizer: {type: 'AdamW'},
    }"""
    config = read(text)
    assert (config.train_batch_size, config.accumulation) == (8, 2)
    assert config.deepspeed["zero_optimization"]["reduce_bucket_size"] == 500_000_000


def test_encodings(read, refused) -> None:
    text = json.dumps(VALID)
    assert read(b"\xef\xbb\xbf" + text.encode()).train_batch_size == 8
    (message,) = refused(b'{"wandb": {"project": "\xe9"}}')
    assert message == "ds.json: not UTF-8: byte 0xe9 at offset 23; save the file as UTF-8"


def test_key_given_twice_is_named_with_its_section(refused) -> None:
    lines = refused(
        '{"train_batch_size": 1, "bf16": {"enabled": true, "enabled": false}, "train_batch_size": 2, "a": [{"b": 1, "b": 1}]}'  # noqa: E501
    )
    assert lines[:3] == [
        "ds.json: bf16.enabled: given twice in bf16; keep one of them",
        "ds.json: train_batch_size: given twice in the top level; keep one of them",
        "ds.json: a.b: given twice in a; keep one of them",
    ]


# --- unknown keys, types ---


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("gradient_cliping", "gradient_clipping"),
        ("zero_optimisation", "zero_optimization"),
        ("optimiser", "optimizer"),
        ("zero_optimization.stagee", "stage"),
        ("zero_optimization.offload_optimizer.divice", "device"),
        ("zero_optimization.offload_param.pin_memry", "pin_memory"),
        ("zero_optimization.leaf_module.clases", "classes"),
        ("bf16.enable", "enabled"),
        ("fp16.inital_scale_power", "initial_scale_power"),
        ("torch_autocast.dtpye", "dtype"),
        ("data_types.grad_acum_dtype", "grad_accum_dtype"),
        ("activation_checkpointing.partitioned_activations", "partition_activations"),
        ("checkpoint.tag_validaton", "tag_validation"),
        ("checkpoint.parallel_write.pipeline_stages", "pipeline_stage"),
        ("optimizer.param", "params"),
        ("scheduler.parms", "params"),
        ("wandb.projekt", "project"),
        ("tensorboard.enabeld", "enabled"),
        ("flops_profiler.profile_stepp", "profile_step"),
        ("comms_logger.verbos", "verbose"),
        ("timers.throughputs", "throughput"),
        ("timers.throughput.enabledd", "enabled"),
        ("aio.blok_size", "block_size"),
        ("compile.deep_compile", "deepcompile"),
        ("tensor_parallel.autotp_sise", "autotp_size"),
        ("data_efficiency.data_sampling.num_epoch", "num_epochs"),
        ("pipeline.partitions", "partition"),
        ("autotuning.enabledd", "enabled"),
        ("expert_parallel.autoep_sizes", "autoep_size"),
        ("optimizer.params.learning_rat", ""),
        ("optimizer.params.weight_deccay", "weight_decay"),
        ("chatgot.schedul", "schedule"),
        ("chatgot.checkpoint.every_step", "every_steps"),
    ],
)
def test_invariant_10_unknown_key_is_refused_at_every_depth(refused, typo: str, meant: str) -> None:
    lines = refused({typo: 1})
    about = [line for line in lines if typo in line or (typo.startswith("chatgot") and typo.rpartition(".")[2] in line)]
    assert about, lines
    if meant:
        assert f"did you mean '{meant}'?" in about[0]


@pytest.mark.parametrize("interval", [4, "auto"])
def test_zenflow_is_refused_for_itself_not_for_the_type_of_its_intervals(refused, interval: object) -> None:
    zenflow = {"update_interval": interval, "select_interval": interval}
    (line,) = refused({"zero_optimization.zenflow": zenflow})
    assert 'zenflow = "{...}": not supported by ChatGoT: ZenFlow' in line


def test_key_in_the_wrong_place_is_sent_home(refused) -> None:
    (line,) = refused({"cpu_checkpointing": True})
    assert line.endswith(
        "unknown key, DeepSpeed would ignore it; it belongs at activation_checkpointing.cpu_checkpointing"
    )


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("gradient_clipping", "one", "a number and >= 0"),
        ("gradient_clipping", "1.0", "a number and >= 0"),
        ("gradient_clipping", True, "a number and >= 0"),
        ("gradient_clipping", -1, "a number and >= 0"),
        ("gradient_clipping", None, "a number and >= 0"),
        ("steps_per_print", 0, "a whole number and >= 1 or null"),
        ("steps_per_print", "10", "a whole number and >= 1 or null"),
        ("train_batch_size", 0, "a whole number and >= 1"),
        ("train_batch_size", "8", "a whole number and >= 1"),
        ("train_micro_batch_size_per_gpu", 1.5, "a whole number and >= 1"),
        ("zero_optimization.stage", 4, "one of 0, 1, 2, 3"),
        ("zero_optimization.stage", None, "one of 0, 1, 2, 3"),
        ("zero_optimization.overlap_comm", "maybe", "true or false or null"),
        ("zero_optimization.reduce_bucket_size", 0, "a whole number and > 0"),
        ("zero_optimization.reduce_bucket_size", "5e8", "a whole number and > 0"),
        ("zero_optimization.offload_optimizer.device", "CPU", "one of none, cpu, nvme; did you mean 'cpu'?"),
        ("zero_optimization.offload_optimizer.ratio", 1.5, "a number and >= 0 and <= 1"),
        ("zero_optimization", 2, "a section {...}"),
        ("communication_data_type", "bfloat16", "one of fp32, fp16, bf16 or null"),
        ("gradient_allreduce_op", "avg", "one of mean, sum"),
        ("checkpoint.tag_validation", "Failz", "one of Ignore, Warn, Fail; did you mean 'Fail'?"),
        ("torch_autocast.dtype", "bfloat17", "did you mean 'bfloat16'?"),
        ("data_types.grad_accum_dtype", "float99", "one of fp32"),
        ("activation_checkpointing", None, "a section {...}"),
        ("activation_checkpointing.partition_activations", "yes", "true or false"),
        ("activation_checkpointing.partition_activations", "false", "true or false"),
        ("wall_clock_breakdown", None, "true or false"),
        ("fp16.loss_scale", "inf", "a number and >= 0"),
        ("optimizer.params", [1], "a section {...}"),
        ("optimizer.params.lr", "1e-3", "a number and >= 0"),
        ("optimizer.params.betas", [0.9, 1.0], "a list of two numbers, each >= 0 and < 1"),
        ("optimizer.params.betas", [0.9], "a list of two numbers, each >= 0 and < 1"),
        ("optimizer.params.weight_decay", -0.1, "a number and >= 0"),
        ("steps_per_print", "auto", '"auto" is not resolved here'),
        ("log_level", "verbose", "one of debug, info, warning, error, critical or null"),
        ("chatgot.checkpoint.every_steps", "often", "expected a whole number"),
        ("chatgot.schedule.min_lr_ratio", 2, "expected a number (>= 0.0 and <= 1.0)"),
        ("chatgot.schedule.type", "cosin", "did you mean 'cosine'?"),
        ("chatgot", 3, "a section {...}"),
    ],
)
def test_wrong_value_is_refused_with_what_is_allowed(refused, key: str, value: Any, allowed: str) -> None:
    lines = [line for line in refused({key: value}) if line.startswith(f"ds.json: {key} = ") or "chatgot" in key]
    assert lines
    assert allowed in lines[0]


@pytest.mark.parametrize(
    ("key", "value", "read_as"),
    [
        ("zero_optimization.stage", "2", 2),
        ("zero_optimization.stage", "2.0", 2),
        ("zero_optimization.stage", True, 1),
        ("zero_optimization.reduce_bucket_size", 5e8, 500_000_000),
        ("zero_optimization.overlap_comm", "false", False),
        ("zero_optimization.prefetch_bucket_size", 4, 4),
        ("checkpoint.tag_validation", "FAIL", "Fail"),
        ("gradient_allreduce_op", "MEAN", "mean"),
        ("communication_data_type", "BF16", "bf16"),
        ("zero_optimization.offload_param", None, None),
        ("aio", None, None),
        ("prescale_gradients", None, None),
        ("data_types.keep_in_fp32_modules", "auto", "auto"),
        ("train_batch_size", 8.0, 8),
    ],
)
def test_what_deepspeed_converts_is_accepted_and_handed_on_unchanged(read, key: str, value: Any, read_as: Any) -> None:
    config = read({key: value})
    here = config.deepspeed
    for part in key.split("."):
        here = here[part]
    assert here == value
    assert type(here) is type(value) or isinstance(value, float)  # hjson reads 5e8 as an int
    if key == "zero_optimization.stage":
        assert config.zero_stage == read_as


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("elasticity", "set train_batch_size"),
        ("amp", "use fp16, bf16 or torch_autocast"),
        ("curriculum_learning", "data_efficiency.data_sampling.curriculum_learning"),
        ("zero_optimization.mics_shard_size", "zero_hpz_partition_size"),
    ],
)
def test_removed_key_is_refused_with_its_replacement(refused, key: str, advice: str) -> None:
    (line,) = refused({key: {"enabled": False}})
    assert advice in line


def test_two_spellings_of_one_key_are_refused(refused, read) -> None:
    lines = refused({"zero_optimization.stage3_prefetch_bucket_size": 2, "zero_optimization.prefetch_bucket_size": 4})
    assert "another spelling of zero_optimization.stage3_prefetch_bucket_size" in lines[0]
    assert "another spelling of bf16" in refused({"bf16": {"enabled": True}, "bfloat16": {"enabled": True}})[0]
    assert read({"bfloat16": {"enabled": True}}).precision == "bf16"


def test_all_problems_come_in_one_message(refused) -> None:
    lines = refused(
        {
            "gradient_cliping": 1,
            "steps_per_print": 0,
            "bf16.enable": True,
            "train_batch_size": 9,
            "optimizer.type": "AdamX",
        }
    )
    assert len(lines) == 5
    assert all(line.startswith("ds.json: ") for line in lines)


# --- optimizer, scheduler ---


@pytest.mark.parametrize("kind", ["Adam", "ADAMW", "adagrad", "Lamb", "Lion", "SGD", "NAdam", "RMSprop", "Adafactor"])
def test_known_optimizers_are_accepted(read, kind: str) -> None:
    config = read({"optimizer": {"type": kind, "params": {"lr": 0.1}}, "zero_allow_untested_optimizer": True})
    assert config.optimizer == OptimizerConfig(kind, {"lr": 0.1})
    assert read({"optimizer": {"type": "Adam", "params": None}}).optimizer == OptimizerConfig("Adam", {})


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ({"type": "AdamQ"}, "unknown optimizer"),
        ({"type": "sgd"}, "did you mean 'SGD'?"),
        ({"type": "OneBitAdam"}, '"OneBitAdam": was removed from DeepSpeed 0.19; use AdamW or Muon'),
        ({"type": "OnebitLamb", "params": {"freeze_step": 1}}, "was removed from DeepSpeed 0.19; use AdamW or Muon"),
        ({"type": "zerooneadam"}, "was removed from DeepSpeed 0.19; use AdamW or Muon"),
        ({"type": "MuAdam"}, "needs the mup package"),
        ({"type": "LBFGS"}, "needs a closure"),
        ({"params": {"lr": 1e-3}}, "optimizer.type: must be given"),
        ({"type": 3}, "expected a text"),
        ({"type": "AdamW", "params": {"max_grad_norm": 1.0}}, "gradient_clipping"),
        ({"type": "AdamW", "params": {"momentum": 0.9}}, "no such argument"),
        ({"type": "AdamW", "params": {"fused": True}}, 'add "torch_adam": true'),
        (
            {"type": "AdamW", "params": {"torch_adam": True, "bias_correction": True}},
            "torch's AdamW has no such argument",
        ),
        (
            {"type": "AdamW", "params": {"torch_adam": True, "fused": True, "foreach": True}},
            "fused or foreach, not both",
        ),
        ({"type": "AdamW", "params": {"adam_w_mode": False}}, 'set optimizer.type = "Adam"'),
        ({"type": "AdamW", "params": {"amsgrad": True}}, 'add "torch_adam": true'),
        ({"type": "Muon", "params": {"nesterov": True}}, "no such argument"),
        ({"type": "SGD", "params": {"lr": 0.1}}, "zero_allow_untested_optimizer = true"),
    ],
)
def test_optimizer_that_would_fail_or_mislead_is_refused(refused, optimizer: dict, said: str) -> None:
    assert said in "\n".join(refused({"optimizer": optimizer}))


def test_fused_kernels_are_refused_on_a_cpu(refused) -> None:
    for kind in ("Lamb", "Lion"):
        lines = refused({"optimizer": {"type": kind}, "zero_allow_untested_optimizer": True}, facts=CPU)
        assert "CUDA only" in lines[0]


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ({"type": "WarmupCosine", "params": {}}, "did you mean 'WarmupCosineLR'?"),
        ({"type": "WarmupLR"}, "scheduler.params: must be given"),
        ({"params": {}}, "scheduler.type: must be given"),
        (
            {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 5}},
            "scheduler.params.total_num_steps: must be given",
        ),
        ({"type": "WarmupLR", "params": {"warmup_steps": 5}}, "no such argument"),
        ({"type": "WarmupLR", "params": {"warmup_type": "cubic"}}, "one of log, linear"),
        ({"type": "ReduceLROnPlateau", "params": {}}, "needs a metric"),
        ({"type": "LambdaLR", "params": {}}, "needs a Python function"),
        ({"type": "StepLR", "params": {"step_size": 2}}, "torch's schedulers fail on ZeRO's optimizers"),
    ],
)
def test_scheduler_that_would_fail_is_refused(refused, scheduler: dict, said: str) -> None:
    assert said in "\n".join(refused({"scheduler": scheduler}))


def test_stock_scheduler_is_kept_but_not_beside_ours(read, refused) -> None:
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}
    config = read({"scheduler": scheduler})
    assert config.scheduler == config.deepspeed["scheduler"] == scheduler
    assert read({"scheduler": scheduler, "chatgot.schedule": None}).scheduler == scheduler
    (line,) = refused({"scheduler": scheduler, "chatgot.schedule.type": "cosine"})
    assert "keep one of them" in line


# --- batch ---


@pytest.mark.parametrize(
    ("total", "micro", "accumulation", "ranks", "expected"),
    [
        (24, 12, ..., 1, (24, 12, 2)),
        (24, ..., 2, 3, (24, 4, 2)),
        (..., 4, 2, 3, (24, 4, 2)),
        (24, ..., ..., 3, (24, 8, 1)),
        (..., 4, ..., 3, (12, 4, 1)),
        (24, 4, 2, 3, (24, 4, 2)),
        (24, 4, "auto", 3, (24, 4, 2)),
        ("auto", 4, 2, 3, (24, 4, 2)),
        (24, "auto", 2, 3, (24, 4, 2)),
        (24, 4, None, 3, (24, 4, 2)),
    ],
)
def test_third_batch_number_is_derived(read, total, micro, accumulation, ranks, expected) -> None:
    keys = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    base = {k: v for k, v in VALID.items() if "batch" not in k}
    tree = {**base, **{k: v for k, v in keys.items() if v is not ...}}
    config = read(json.dumps(tree), world_size=ranks)
    assert (config.train_batch_size, config.micro_batch_size, config.accumulation) == expected
    assert tuple(config.deepspeed[name] for name in keys) == expected
    derived = [name for name, value in keys.items() if not isinstance(value, int)]
    assert all(any(note.startswith(f"{name} = ") for note in config.notes) for name in derived)


def test_derived_batch_is_explained(read) -> None:
    notes = read(
        {"train_batch_size": ..., "train_micro_batch_size_per_gpu": 12, "gradient_accumulation_steps": 2}
    ).notes
    assert "train_batch_size = 24: 12 per rank x 2 accumulation x 1 rank" in notes


@pytest.mark.parametrize(
    ("keys", "ranks", "said"),
    [
        (
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 5},
            1,
            "expected train_batch_size = 30 or train_batch_size = 35",
        ),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 3}, 2, "or train_micro_batch_size_per_gpu = 2"),
        (
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3},
            2,
            "expected train_batch_size = 24 or gradient_accumulation_steps = 4",
        ),
        (
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3},
            2,
            "gradient_accumulation_steps = 4",
        ),
        (
            {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
            1,
            "micro_batch_size_per_gpu = 12",
        ),
        ({"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4}, 2, "train_micro_batch_size_per_gpu = 2"),
        (
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 5},
            3,
            "train_batch_size = 45",
        ),
        (
            {"train_batch_size": 7, "train_micro_batch_size_per_gpu": ..., "gradient_accumulation_steps": 4},
            2,
            "train_batch_size = 8",
        ),
        ({"train_batch_size": 10**15, "train_micro_batch_size_per_gpu": 3}, 1, "train_micro_batch_size_per_gpu = 4"),
    ],
)
def test_batch_that_does_not_fit_is_refused_with_numbers_that_do(
    refused, read, keys: dict, ranks: int, said: str
) -> None:
    (line,) = refused(keys, world_size=ranks)
    assert said in line
    options = line.partition("; expected ")[2].split(" or ")
    assert len(options) >= 3
    for option in options:
        changes = {
            name: int(value) for name, _, value in (change.partition(" = ") for change in option.split(" with "))
        }
        read({**keys, **changes}, world_size=ranks)  # every correction is one


def test_too_few_batch_numbers_are_refused(refused) -> None:
    none = {"train_batch_size": ..., "train_micro_batch_size_per_gpu": ...}
    assert "give two of" in refused(none)[0]
    assert "give two of" in refused({**none, "gradient_accumulation_steps": 2})[0]


# --- precision ---


@pytest.mark.parametrize(
    ("bf16", "fp16", "facts", "precision"),
    [
        ("auto", ..., GPU, "bf16"),
        ("auto", ..., OLD_GPU, "fp32"),
        ("auto", "auto", GPU, "bf16"),
        ("auto", "auto", OLD_GPU, "fp16"),
        (..., "auto", GPU, "fp16"),
        (..., "auto", CPU, "fp32"),
        ("auto", "auto", CPU, "bf16"),
        ("auto", True, GPU, "fp16"),
        (True, "auto", GPU, "bf16"),
        (False, "auto", GPU, "fp16"),
    ],
)
def test_auto_precision_follows_the_device(read, bf16, fp16, facts, precision) -> None:
    keys = {f"{name}.enabled": value for name, value in (("bf16", bf16), ("fp16", fp16)) if value is not ...}
    config = read(keys, facts=facts)
    assert config.precision == precision
    for name, value in (("bf16", bf16), ("fp16", fp16)):
        if value == "auto":
            assert config.deepspeed[name]["enabled"] is (precision == name)
            assert any(note.startswith(f"{name}.enabled = ") and '"auto"' in note for note in config.notes)


@pytest.mark.parametrize(
    ("keys", "facts", "said"),
    [
        ({"bf16.enabled": True, "fp16.enabled": True}, GPU, "enable one of them"),
        ({"bf16.enabled": True}, OLD_GPU, "bf16 is not supported on this device (V100); use fp16 or fp32"),
        ({"fp16.enabled": True}, CPU, "fp16 is not supported on this device (cpu); use bf16 or fp32"),
        ({"torch_autocast.enabled": True}, GPU, "torch_autocast.dtype: must be given"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, CPU, "fp16 is not supported"),
        ({"torch_autocast": {"enabled": True, "dtype": "bf16"}, "fp16.enabled": True}, GPU, "enable one of them"),
        ({"data_types.param_dtype": "bf16"}, GPU, "must equal the training precision"),
        ({"data_types.grad_accum_dtype": "bf16", "zero_optimization.stage": 0}, GPU, "at ZeRO stage 0"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, GPU, "bf16_master_weights_and_grads"),
        ({"bf16.bf16_master_weights_and_grads": True, "zero_optimization.stage": 0}, GPU, "needs ZeRO stage 1, 2 or 3"),
        ({"bf16.bf16_master_weights_and_grads": True}, GPU, "needs bf16.bf16_optimizer_states = true, or"),
        ({"fp16.fp16_master_weights_and_grads": True}, GPU, "offload_optimizer.device"),
        ({"fp16": {"enabled": True, "loss_scale_window": 0}}, GPU, "must be > 0"),
    ],
)
def test_precision_that_cannot_work_is_refused(refused, keys: dict, facts, said: str) -> None:
    assert said in "\n".join(refused(keys, facts=facts))


def test_autocast_is_allowed_at_stage_0(read) -> None:
    config = read({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization.stage": 0})
    assert config.precision == "autocast_bf16"
    assert (
        read({"torch_autocast": {"enabled": True, "dtype": "half"}, "zero_optimization.stage": 0}).precision
        == "autocast_fp16"
    )


def test_fp16_autocast_is_refused_where_deepspeed_clips_scaled_gradients(refused) -> None:
    said = "\n".join(refused({"torch_autocast": {"enabled": True, "dtype": "half"}, "zero_optimization.stage": 1}))
    assert "torch_autocast.dtype" in said
    assert "stage 0 only" in said


# --- ZeRO ---


def test_buckets_follow_the_model(read) -> None:
    keys = {"zero_optimization.stage": 3, "zero_optimization.allgather_bucket_size": "auto"}
    first = read(keys)
    assert first.deepspeed["zero_optimization"]["allgather_bucket_size"] == "auto"
    config = read(keys, n_params=1001)
    zero = config.deepspeed["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == zero["stage3_prefetch_bucket_size"] == 1002
    assert sum("1,001 parameters" in note for note in config.notes) == 3
    assert read(keys, n_params=10**10).deepspeed["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    stated = read({**keys, "zero_optimization.reduce_bucket_size": 7}, n_params=1001)
    assert stated.deepspeed["zero_optimization"]["reduce_bucket_size"] == 7
    stage2 = read({"zero_optimization.stage": 2}, n_params=1001).deepspeed["zero_optimization"]
    assert stage2 == {"stage": 2, "reduce_bucket_size": 1002, "allgather_bucket_size": 1002}
    assert read({"zero_optimization.stage": 0}, n_params=1001).deepspeed["zero_optimization"] == {"stage": 0}


def test_persistence_threshold_auto_is_the_default(read) -> None:
    config = read({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": "auto"}})
    assert config.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] == 100_000


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "nvme_path: must be given"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/n"}}},
            '"nvme" needs ZeRO stage 3',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "below 1 needs ZeRO stage 3",
        ),
        ({"zero_optimization": {"stage": 1, "allgather_bucket_size": 3}}, "must be an even number"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "false needs gradient_clipping = 0"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "must divide the number of ranks, 1"),
        (
            {"zero_optimization": {"stage": 2, "elastic_checkpoint": True}},
            "cannot load what it saves with it; delete it",
        ),
        (
            {"zero_optimization": {"stage": 3, "elastic_checkpoint": True}},
            "cannot load what it saves with it; delete it",
        ),
        ({"zero_optimization": {"stage": 1, "legacy_stage1": True}}, "no longer has the old stage 1"),
        ({"zero_optimization": {"stage": 1, "zenflow": {}}}, "not supported by ChatGoT"),
        ({"gradient_predivide_factor": 2.0, "zero_optimization.stage": 2}, "reduce_scatter = false"),
        ({"prescale_gradients": True, "zero_optimization.stage": 2}, "reduce_scatter = false"),
        ({"gradient_allreduce_op": "sum", "zero_optimization.stage": 3}, 'use "mean"'),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "takes its CPUAdam only for it: optimizer.type must be AdamW or Adam, without torch_adam",
        ),
        (
            {
                "optimizer": {"type": "AdamW", "params": {"amsgrad": True}},
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            },
            "DeepSpeed's Adam does not have it",
        ),
        (
            {
                "optimizer": {"type": "Adam", "params": {"adam_w_mode": False}},
                "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            },
            "steps a part of the weights with AdamW",
        ),
        ({"allgather_size": 5}, "write zero_optimization.allgather_bucket_size"),
        ({"optimizer": {"type": "Muon"}, "zero_optimization.stage": 3}, "reduce_scatter = false"),
        (
            {"optimizer": {"type": "Muon"}, "zero_optimization.offload_optimizer": {"device": "cpu"}},
            "does not work with optimizer offload",
        ),
    ],
)
def test_zero_settings_that_contradict_each_other_are_refused(refused, keys: dict, said: str) -> None:
    assert said in "\n".join(refused(keys))


def test_cpu_adam_is_deepspeeds_where_it_takes_no_other_and_the_file_or_the_key_asks_for_it(read, refused) -> None:
    plain = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    ratio, super_offload = (f"zero_optimization.offload_optimizer.{key}" for key in ("ratio", "super_offload"))
    assert read(plain).cpu_adam_key == read({**plain, ratio: 1.0}).cpu_adam_key == ""
    assert read({**plain, ratio: 0.5}).cpu_adam_key == ratio
    assert read({**plain, "zero_force_ds_cpu_optimizer": True}).cpu_adam_key == "zero_force_ds_cpu_optimizer"
    assert read({**plain, "zero_force_ds_cpu_optimizer": False}).cpu_adam_key == ""
    assert read({"zero_force_ds_cpu_optimizer": True}).cpu_adam_key == ""  # nothing is offloaded
    config = read({**plain, super_offload: True})
    assert config.cpu_adam_key == super_offload
    assert any("a resumed run starts with a new state" in note for note in config.notes)
    (line,) = refused({**plain, super_offload: True}, facts=CPU)
    assert "works on CUDA only" in line


def test_muon_is_accepted_where_it_works(read) -> None:
    for zero in ({"stage": 0}, {"stage": 1}, {"stage": 2}, {"stage": 3, "reduce_scatter": False}):
        params = {"muon_lr": 0.02, "adam_lr": 1e-3, "momentum": 0.95}
        assert (
            read({"optimizer": {"type": "muon", "params": params}, "zero_optimization": zero}).zero_stage
            == zero["stage"]
        )


@pytest.mark.parametrize(
    ("keys", "ranks", "level", "said"),
    [
        ({"bf16.enabled": True, "zero_optimization.load_from_fp32_weights": False}, 1, "warning", "rounds the weights"),
        ({"zero_optimization.load_from_fp32_weights": False}, 1, None, "rounds the weights"),  # they are fp32
        ({"communication_data_type": "bf16"}, 1, "note", "rounds the gradients to bf16 all the same"),
        ({"communication_data_type": "bf16"}, 2, None, "all the same"),
        ({"optimizer.type": "Muon"}, 1, "adapted", "the updates too, which stops it from learning"),
        ({"optimizer.type": "Muon", "zero_optimization.stage": 0}, 1, "adapted", "all gradients, by the norm of all"),
        ({"optimizer.type": "Muon", "gradient_clipping": 0}, 1, None, "for the AdamW groups only"),
        (
            {"optimizer.type": "Muon", "bf16.enabled": True, "data_types.grad_accum_dtype": "fp32"},
            1,
            None,
            "for the AdamW groups only",
        ),
        ({"optimizer": {"type": "Adagrad"}}, 1, "note", "weight decay reaches biases and norms too"),
        ({"optimizer": {"type": "Adagrad"}, "zero_optimization.stage": 0}, 1, None, "biases and norms"),
        ({"activation_checkpointing": {}}, 1, "adapted", "recomputes every block"),
        ({"activation_checkpointing": {"profile": False}}, 1, "adapted", "recomputes every block"),
        ({"activation_checkpointing": {"profile": True}}, 1, None, "recomputes every block"),
        (
            {"activation_checkpointing": {}, "chatgot.activation_checkpointing.every_n_layers": 2},
            1,
            None,
            "recomputes every block",
        ),
    ],
)
def test_what_is_not_as_it_seems_is_said(read, keys: dict, ranks: int, level: str | None, said: str) -> None:
    assert {f.level for f in read(keys, world_size=ranks).findings if said in f.why} == ({level} if level else set())


def test_old_forms_are_understood(read) -> None:
    config = read({"zero_optimization": {"stage": 3, "cpu_offload": True, "cpu_offload_param": True}})
    assert (config.offload_optimizer, config.offload_param) == ("cpu", "cpu")
    assert sum("is deprecated" in note for note in config.notes) == 2
    config = read({"zero_optimization": True, "allgather_size": 5}, n_params=10)
    assert config.zero_stage == 1
    assert config.deepspeed["zero_optimization"] is True


def test_overlap_at_stage_1_and_2_is_remarked(read) -> None:
    assert any("overlap_comm" in note for note in read({"zero_optimization.overlap_comm": True}).notes)
    assert not any(
        "overlap_comm" in note for note in read({"zero_optimization": {"stage": 3, "overlap_comm": True}}).notes
    )


def test_defaults_that_changed_are_stated(read) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu", "pin_memory": False}}
    config = read({"gradient_clipping": ..., "bfloat16.enabled": True, "zero_optimization": {"stage": 3, **offload}})
    assert config.gradient_clipping == config.deepspeed["gradient_clipping"] == 1.0
    assert config.deepspeed["bfloat16"] == {"enabled": True, "check_grad_overflow": True}
    assert config.deepspeed["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert config.deepspeed["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert sum("DeepSpeed's default since 2026" in note for note in config.notes) == 3


@pytest.mark.parametrize(
    "keys",
    [
        {"checkpoint.writer": {"type": "fast"}},
        {"checkpoint.use_node_local_storage": True},
        {"datastates_ckpt": {}},
        {"datastates_ckpt": True},
        {"hybrid_engine.enabled": True},
        {"tensor_parallel.autotp_size": 2},
        {"tensor_parallel.tp.tp_size": 2},
        {"tensor_parallel.dtype": "float16"},
        {"expert_parallel.load_balance_coeff": 0.1},
        {"expert_parallel.enabled": True},
        {"autotuning.enabled": True},
        {"weight_quantization": {}},
        {"pipeline.stages": 2},
        {"sequence_parallel_size": 2},
        {"data_parallel_size": 2},
        {"managed_gradient_accumulation": False},
        {"compile.passes": ["autosp"]},
    ],
)
def test_what_chatgot_cannot_honour_is_refused(refused, keys: dict) -> None:
    (line,) = refused(keys)
    assert next(iter(keys)) in line


def test_what_is_switched_off_is_accepted(read) -> None:
    off = {
        "hybrid_engine": {"enabled": False, "max_out_tokens": 64},
        "tensor_parallel": {"autotp_size": 0, "tp": {"tp_size": 1}},
        "expert_parallel": {"enabled": False, "top_k": "auto"},
        "data_efficiency": {"enabled": False, "data_sampling": {"curriculum_learning": {"enabled": False}}},
        "autotuning": {"enabled": False, "model_info": {"num_params": 3}},
        "weight_quantization": {"enabled": False},
        "pipeline": {"stages": "auto"},
        "checkpoint": {"load_universal": False, "writer": None},
        "datastates_ckpt": False,
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 1, "zenflow": None, "offload_param": {"device": "none"}},
        "sequence_parallel_size": 1,
        "data_parallel_size": 1,
    }
    assert read(off).precision == "fp32"


# --- activation checkpointing ---


def test_presence_of_the_section_turns_recomputation_on(read) -> None:
    assert read().activation_checkpointing is None
    assert read().activation_backend is None
    config = read({"activation_checkpointing": {}})
    assert config.activation_checkpointing == {}
    assert config.activation_backend == "torch"
    assert read({"activation_checkpointing": {"profile": True}}).activation_backend == "deepspeed"
    both = {
        "activation_checkpointing": {},
        "chatgot.activation_checkpointing": {"backend": "deepspeed", "every_n_layers": 2},
    }
    assert read(both).activation_backend == "deepspeed"
    assert read(both).chatgot.activation_checkpointing.every_n_layers == 2


@pytest.mark.parametrize(
    ("section", "backend", "more", "facts", "said"),
    [
        ({"cpu_checkpointing": True}, "auto", {}, CPU, "works on CUDA only"),
        ({"profile": True}, "torch", {}, GPU, 'only the backend "deepspeed" does this'),
        ({"partition_activations": True}, "torch", {}, GPU, 'only the backend "deepspeed" does this'),
        (
            {},
            "deepspeed",
            {"torch_autocast": {"enabled": True, "dtype": "bf16"}},
            GPU,
            "wrong gradients under torch_autocast",
        ),
        (
            {"profile": True},
            "auto",
            {"torch_autocast": {"enabled": True, "dtype": "bf16"}},
            GPU,
            "wrong gradients under torch_autocast",
        ),
        (
            {"contiguous_memory_optimization": True, "number_checkpoints": 2},
            "auto",
            {},
            GPU,
            "partition_activations = true",
        ),
    ],
)
def test_recomputation_that_cannot_work_is_refused(refused, section, backend, more, facts, said) -> None:
    keys = {"activation_checkpointing": section, "chatgot.activation_checkpointing.backend": backend, **more}
    assert said in "\n".join(refused(keys, facts=facts))


def test_refinement_without_the_section_is_refused(refused) -> None:
    (line,) = refused({"chatgot.activation_checkpointing.every_n_layers": 2})
    assert "does nothing without the DeepSpeed section" in line


def test_deepcompile_compiles_the_model_by_itself(read, refused, write) -> None:
    for keys, said in (
        ({"compile.deepcompile": True}, "turns chatgot.compile.enabled on"),
        ({"compile": {"deepcompile": True, "passes": ["z1"]}}, "turns chatgot.compile.enabled on"),
        ({"compile.deepcompile": True, "zero_optimization.stage": 0}, "at ZeRO stage 0 torch.compile"),
        (
            {"compile.deepcompile": True, "chatgot.compile.enabled": True, "zero_optimization.stage": 0},
            "at ZeRO stage 0 torch.compile",
        ),
    ):
        config = read(keys)
        assert config.chatgot.compile.enabled
        assert any(f.level == "adapted" and said in f.why for f in config.findings)
        assert read_engine_config(write(config.to_dict()), world_size=1, facts=GPU) == config
    both = {"compile.deepcompile": True, "chatgot.compile.enabled": True}
    assert not [f for f in read(both).findings if f.level == "adapted"]
    assert not read({"compile": {"deepcompile": False}}).chatgot.compile.enabled
    (line,) = refused({"compile.deepcompile": True, "chatgot": {"compile": 5}})
    assert "chatgot.compile = 5" in line
    (line,) = refused({"compile.deepcompile": True, "chatgot.compile.enabled": False})
    assert "take one of them out" in line
    (line,) = refused({**both, "chatgot.compile.mode": "reduce-overhead", "zero_optimization.stage": 2})
    assert 'use "default"' in line
    config = read({"compile.deepcompile": True}, facts=CPU)
    assert (config.chatgot.compile.enabled, config.deepspeed["compile"]) == (False, {"deepcompile": False})
    assert [f.key for f in config.findings if f.level == "adapted"] == ["compile.deepcompile"]


# --- what comes of it ---


def test_wandb_is_ours_and_not_deepspeeds(read) -> None:
    config = read({"wandb": {"enabled": "true", "project": "p", "team": None}})
    assert config.wandb == WandbConfig(enabled=True, project="p")
    assert "wandb" not in config.deepspeed
    assert read().wandb == WandbConfig(enabled=False, project="deepspeed")


EVERYTHING = {
    "bf16.enabled": "auto",
    "fp16.enabled": "auto",
    "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "cpu"}},
    "gradient_clipping": ...,
    "activation_checkpointing": {"profile": False},
    "chatgot": {
        "schedule": {"type": "wsd"},
        "checkpoint": {"every_minutes": None},
        "activation_checkpointing": {"every_n_layers": 2},
    },
    "wandb": {"enabled": True, "group": "g"},
    "steps_per_print": None,
    "comms_logger": {},
}


@pytest.mark.parametrize("changes", [{}, EVERYTHING, {"activation_checkpointing": {}, "chatgot.schedule": None}])
@pytest.mark.parametrize("ranks", [1, 2])
def test_stored_configuration_reads_back_as_the_same(read, write, changes: dict, ranks: int) -> None:
    config = read(changes, world_size=ranks, n_params=999)
    again = read_engine_config(write(config.to_dict()), world_size=ranks, facts=GPU)
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert "auto" not in json.dumps({k: v for k, v in config.to_dict().items() if k != "chatgot"})
    assert not [
        note for note in again.notes if not note.startswith(("note: ", "warning: ")) and "backend" not in note
    ]  # nothing to derive


def test_configurations_that_differ_are_not_equal(read) -> None:
    assert read() != read({"optimizer.params.lr": 2e-3})
    assert read() != read({"chatgot.guard.max_consecutive_skips": 9})


def test_invariant_11_nothing_stated_in_the_file_is_changed(read, write) -> None:
    changes = {**EVERYTHING, "zero_optimization": {"stage": "3", "overlap_comm": "false", "sub_group_size": 1e9}}
    tree = with_keys({k: v for k, v in changes.items() if v is not ... and "16" not in k})
    tree.update(
        {"tensorboard": {"enabled": False}, "timers": {"throughput": {"enabled": False}}, "bf16": {"enabled": True}}
    )
    stated = copy.deepcopy(tree)
    config = read_engine_config(write(tree), world_size=1, facts=GPU, n_params=999)
    assert config.source == stated

    def assert_kept(mine: Any, theirs: Any, where: str) -> None:
        if isinstance(mine, dict):
            for key, value in mine.items():
                assert_kept(value, theirs[key], f"{where}.{key}")
        else:
            assert theirs == mine, where

    assert_kept({k: v for k, v in stated.items() if k not in ("chatgot", "wandb")}, config.deepspeed, "")
    assert config.deepspeed["zero_optimization"]["overlap_comm"] == "false"
    added = set(config.deepspeed) - set(stated)
    assert added == {"gradient_accumulation_steps"} - set(stated)


def test_stated_numbers_keep_their_form_and_the_callers_tree_is_left_alone() -> None:
    tree = with_keys({"train_batch_size": 8.0, "bf16.enabled": "auto"})
    config = build_engine_config(tree, "ds.json", {"optimizer.params.lr": 0.5}, world_size=1, facts=GPU)
    assert isinstance(config.deepspeed["train_batch_size"], float)
    assert isinstance(config.train_batch_size, int)
    assert tree == with_keys({"train_batch_size": 8.0, "bf16.enabled": "auto"})
    tree["optimizer"]["params"]["lr"] = 7
    assert config.source["optimizer"]["params"]["lr"] == 1e-3


def test_caller_may_change_what_it_got(read) -> None:
    config = read({"activation_checkpointing": {}})
    assert config.optimizer is not None
    config.optimizer.params["lr"] = 9
    config.deepspeed["optimizer"]["params"]["lr"] = 8
    assert config.source["optimizer"]["params"]["lr"] == 1e-3
    assert config.optimizer.params["lr"] == 9


def test_configuration_is_read_without_torch_or_deepspeed() -> None:
    import subprocess
    import sys

    code = (
        "import sys, chatgot.deepspeed_json.resolve as d, chatgot.config.overrides; "
        "from pathlib import Path; from chatgot.deepspeed_json.read import read_document; "
        "document, facts = read_document(Path('ds_configs/bf16_zero2.json')), d.DeviceFacts('cpu', True, False); "
        "d.resolve(document, world_size=1, facts=facts).complete().engine_config(); "
        "print([m for m in ('torch', 'deepspeed', 'wandb') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
