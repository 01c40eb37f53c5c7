"""Broken and unwise configurations with what must be said of each: level, key, and words of the message, at the right
line of the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatgot.deepspeed_json.check import Report, check
from chatgot.deepspeed_json.findings import OVERRIDE
from chatgot.devices import DeviceFacts
from tests.deepspeed_json.conftest import (
    CPU,
    GPU,
    OLD_GPU,
    VALID,
    with_keys,
)

ZERO = "zero_optimization"
OFFLOAD = {"device": "cpu", "pin_memory": True}


def looked_at(tmp_path: Path, changes: dict[str, Any] | str, **more: Any) -> Report:
    path = tmp_path / "ds.json"
    path.write_text(changes if isinstance(changes, str) else json.dumps(with_keys(changes), indent=1), encoding="utf-8")
    return check(str(path), more.pop("overrides", None), **{"world_size": 1, "facts": GPU, **more})


CASES: list[tuple[dict[str, Any], str, str, str, dict[str, Any]]] = [
    # typos and keys in the wrong place
    ({"gradient_cliping": 1.0}, "error", "gradient_cliping", "did you mean 'gradient_clipping'", {}),
    ({"zero_optimisation": {"stage": 2}}, "error", "zero_optimisation", "did you mean 'zero_optimization'", {}),
    ({f"{ZERO}.offload_optimizer": {"devise": "cpu"}}, "error", f"{ZERO}.offload_optimizer.devise", "did you mean 'device'", {}),
    ({"optimizer.params.weigth_decay": 0.1}, "error", "optimizer.params.weigth_decay", "did you mean 'weight_decay'", {}),
    ({"chatgot": {"checkpoint": {"every_step": 5}}}, "error", "chatgot.checkpoint.every_step", "did you mean 'every_steps'", {}),
    ({"chatgot": {"guard": {"a": 1}, "compile": {"mod": "x"}}}, "error", "chatgot.compile.mod", "did you mean 'mode'", {}),
    ({"stage": 2}, "error", "stage", "it belongs at zero_optimization.stage", {}),
    ({f"{ZERO}.gradient_clipping": 1.0}, "error", f"{ZERO}.gradient_clipping", "DeepSpeed would refuse it", {}),
    ({"data_efficiency": {"data_sampling": {"curriculum_learning": {"enabledd": False}}}}, "error",
     "data_efficiency.data_sampling.curriculum_learning.enabledd", "did you mean 'enabled'", {}),
    # CUDA graphs
    ({"chatgot": {"compile": {"enabled": True, "mode": "reduce-overhead"}}}, "error", "chatgot.compile.mode", "overwrite gradients", {}),
    ({"timers": ...}, "note", "timers.throughput.enabled", "waits for the device twice in every micro-batch", {}),
    ({"timers.throughput.enabled": True}, "note", "timers.throughput.enabled", "waits for the device", {}),
    # removed
    ({"amp": {"enabled": False}}, "error", "amp", "use fp16, bf16 or torch_autocast", {}),
    ({"elasticity": {"enabled": False}}, "error", "elasticity", "set train_batch_size", {}),
    ({f"{ZERO}.mics_shard_size": 2}, "error", f"{ZERO}.mics_shard_size", "zero_hpz_partition_size", {}),
    # values
    ({"gradient_clipping": "one"}, "error", "gradient_clipping", "expected a number and >= 0", {}),
    ({"steps_per_print": "auto"}, "error", "steps_per_print", '"auto" is not resolved here', {}),
    ({f"{ZERO}.stage": 4}, "error", f"{ZERO}.stage", "expected one of 0, 1, 2, 3", {}),
    ({f"{ZERO}.offload_optimizer": {"device": "CPU"}}, "error", f"{ZERO}.offload_optimizer.device", "did you mean 'cpu'", {}),
    ({"checkpoint.tag_validation": "Fial"}, "error", "checkpoint.tag_validation", "did you mean 'Fail'", {}),
    ({"steps_per_print": 0}, "error", "steps_per_print", ">= 1", {}),
    ({"optimizer.params.betas": [0.9, 1.0]}, "error", "optimizer.params.betas", "each >= 0 and < 1", {}),
    ({"chatgot": {"schedule": {"type": "cosin"}}}, "error", "chatgot.schedule.type", "did you mean 'cosine'", {}),
    ({"chatgot": {"wandb": {"tags": ["a", 1]}}}, "error", "chatgot.wandb.tags", "expected a list of texts", {}),
    ({"fp16": {"loss_scale_window": "x"}}, "error", "fp16.loss_scale_window", "a whole number", {}),
    ({"bf16": True}, "error", "bf16", "a section {...}", {}),
    # batch
    ({"train_batch_size": 9}, "error", "train_batch_size", "train_batch_size = 8 or train_batch_size = 12", {}),
    ({"gradient_accumulation_steps": 3}, "error", "train_batch_size", "gradient_accumulation_steps = 2", {}),
    ({"train_batch_size": 12}, "error", "train_batch_size", "train_micro_batch_size_per_gpu = 3", {"world_size": 2}),
    ({"train_batch_size": "auto"}, "adapted", "gradient_accumulation_steps", "8, for 32 samples a step", {}),
    ({"train_batch_size": ...}, "note", "train_batch_size", "4 follows from the number of ranks", {}),
    # precision
    ({"bf16.enabled": True, "fp16.enabled": True}, "error", "fp16.enabled", "enable one of them", {}),
    ({"bf16.enabled": True, f"{ZERO}.stage": 0}, "adapted", f"{ZERO}.stage", "bf16 runs at ZeRO stage 1", {}),
    ({"bf16.enabled": True}, "error", "bf16.enabled", "not supported on this device (V100)", {"facts": OLD_GPU}),
    ({"fp16.enabled": True}, "warning", "fp16.enabled", "seen from this machine",
     {"facts": DeviceFacts("cpu", bf16=True, fp16=False, certain=False)}),
    ({"torch_autocast.enabled": True}, "error", "torch_autocast.dtype", "must be given", {}),
    ({"bf16.enabled": True, "train_batch_size": 32}, "warning", "data_types.grad_accum_dtype", "8 micro batches are summed in bf16", {}),
    ({"communication_data_type": "fp16"}, "warning", "communication_data_type", "overflows", {}),
    ({"fp16": {"enabled": True, "loss_scale": 128, "initial_scale_power": 8}}, "note", "fp16.initial_scale_power", "does nothing", {}),
    # ZeRO and offload
    ({f"{ZERO}.stage3_max_live_parameters": 5}, "warning", f"{ZERO}.stage3_max_live_parameters", "stage 3 only, and the stage is 1", {}),
    ({f"{ZERO}": {"stage": 3, "round_robin_gradients": True}}, "warning", f"{ZERO}.round_robin_gradients", "stages 1, 2 only", {}),
    ({f"{ZERO}": {"stage": 0, "reduce_bucket_size": 5}}, "warning", f"{ZERO}.reduce_bucket_size", "and the stage is 0", {}),
    ({f"{ZERO}.offload_param": OFFLOAD}, "adapted", f"{ZERO}.offload_param.device", "from ZeRO stage 3 on", {}),
    ({f"{ZERO}.offload_optimizer": OFFLOAD, "optimizer.type": "Lamb", "optimizer.params": {}, "zero_allow_untested_optimizer": True},
     "error", "optimizer.type", "cannot step on offloaded state", {}),
    ({f"{ZERO}.offload_optimizer": OFFLOAD, "optimizer": {"type": "Muon"}}, "error", "optimizer.type",
     "does not work with optimizer offload", {}),
    ({f"{ZERO}.offload_optimizer": {"device": "cpu"}}, "note", f"{ZERO}.offload_optimizer.pin_memory", "true since 2026, false before", {}),
    ({f"{ZERO}.overlap_comm": True}, "warning", f"{ZERO}.overlap_comm", "races were reported", {}),
    ({f"{ZERO}.reduce_bucket_size": 500_000_000}, "warning", f"{ZERO}.reduce_bucket_size", "beyond the model's 1,001", {"n_params": 1001}),
    ({f"{ZERO}.reduce_bucket_size": 2000}, "note", f"{ZERO}.reduce_bucket_size", "beyond the model's 1,001", {"n_params": 1001}),
    ({f"{ZERO}.stage": 3}, "note", f"{ZERO}.stage", "nobody to share with", {}),
    ({f"{ZERO}.cpu_offload": True}, "note", f"{ZERO}.cpu_offload", "is deprecated", {}),
    ({f"{ZERO}.zero_quantized_weights": True}, "error", f"{ZERO}.zero_quantized_weights", "CUDA only", {"facts": CPU}),
    ({"gradient_allreduce_op": "sum"}, "warning", "gradient_allreduce_op", "2 times those of the mean", {"world_size": 2}),
    # optimizer and scheduler
    ({"optimizer": ...}, "adapted", "optimizer", 'it trains with that of bf16_zero1.json', {}),
    ({"optimizer.type": "AdamX"}, "error", "optimizer.type", "did you mean 'Adam", {}),
    ({"optimizer": {"type": "SGD", "params": {"lr": 1}}}, "error", "optimizer.type", "zero_allow_untested_optimizer", {}),
    ({"optimizer": {"type": "Muon", "params": {"lr": 0.02}}}, "adapted", "optimizer.type", "Muon's orthogonalised updates", {}),
    ({"optimizer": {"type": "Adam"}}, "note", "optimizer.params.lr", "the default is 0.001", {}),
    ({"scheduler": {"type": "WarmupLR", "params": {}}, "chatgot": {"schedule": {}}}, "error", "scheduler", "keep one of them", {}),
    ({"scheduler": {"type": "WarmupLR"}}, "error", "scheduler.params", "must be given", {}),
    ({"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 9}}}, "warning", "scheduler.type",
     "never reaches the peak", {}),
    # no effect
    ({"hybrid_engine": {"max_out_tokens": 64}}, "note", "hybrid_engine", "stands here but is off", {}),
    ({"tensorboard": {"enabled": False, "job_name": "x"}}, "note", "tensorboard.job_name", "the section is off", {}),
    ({"pipeline": {"stages": "auto"}}, "note", "pipeline", "does nothing", {}),
    ({"aio": {"queue_depth": 16}}, "note", "aio.queue_depth", "does nothing", {}),
    ({"vocabulary_size": 100}, "warning", "vocabulary_size", "does nothing", {}),
    ({"disable_allgather": True}, "warning", "disable_allgather", "does nothing", {}),
    ({f"{ZERO}.allgather_partitions": False}, "warning", f"{ZERO}.allgather_partitions", "uses it nowhere", {}),
    ({"activation_checkpointing": {"partition_activations": True}}, "warning",
     "activation_checkpointing.partition_activations", "saves nothing", {}),
    ({"chatgot": {"activation_checkpointing": {}}}, "error", "chatgot.activation_checkpointing",
     "does nothing without the DeepSpeed section", {}),
    ({"wall_clock_breakdown": True}, "note", "wall_clock_breakdown", "slows training down", {}),
    ({"disable_python_gc": True}, "warning", "disable_python_gc", "memory may grow", {}),
    ({"gradient_clipping": ...}, "note", "gradient_clipping", "1.0 since 2026, 0 before", {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "level", "key", "words", "more"), CASES, ids=[f"{case[2]}-{i}" for i, case in enumerate(CASES)]
)
def test_finding_is_made(
    tmp_path: Path, changes: dict[str, Any], level: str, key: str, words: str, more: dict[str, Any]
) -> None:
    report = looked_at(tmp_path, changes, **more)
    found = [
        finding
        for finding in report.findings
        if (finding.level, finding.key) == (level, key) and words in finding.message
    ]
    assert len(found) == 1, [(f.level, f.key, f.message) for f in report.findings]
    assert report.exit_code == (2 if any(finding.level == "error" for finding in report.findings) else 0)
    lines = (tmp_path / "ds.json").read_text(encoding="utf-8").splitlines()
    here = found[0]
    if here.line is not None:
        assert here.column is not None
        named = lines[here.line - 1][here.column - 1 :].split('"')[1]
        assert named in key.split(".")
    else:
        assert f'"{key.rpartition(".")[2]}"' not in "\n".join(lines)


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60


def test_all_findings_come_at_once_in_order(tmp_path: Path) -> None:
    changes = {
        "gradient_cliping": 1,
        "steps_per_print": 0,
        f"{ZERO}.overlap_comm": True,
        "gradient_clipping": ...,
        "optimizer.params.l": 1,
    }
    changes["wall_clock_breakdown"] = True
    report = looked_at(tmp_path, changes, overrides={"bf16.enabled": 3})
    assert [(f.level, f.key, f.file == OVERRIDE) for f in report.findings] == [
        ("error", "optimizer.params.l", False),
        ("error", "gradient_cliping", False),
        ("error", "steps_per_print", False),
        ("error", "bf16.enabled", True),
        ("warning", f"{ZERO}.overlap_comm", False),
        ("note", "wall_clock_breakdown", False),
    ]  # and not that gradient_clipping is not stated: the typo says so already
    lines = [finding.line for finding in report.findings if finding.level == "error" and finding.line]
    assert lines == sorted(lines)


@pytest.mark.parametrize(
    ("text", "line", "column", "excerpt"),
    [
        ('{\n  "train_batch_size": 8\n  "bf16": {}\n', 3, 3, '      "bf16": {}\n      ^'),
        ('{"a": tru}', 1, 7, '    {"a": tru}\n          ^'),
        ('{"a": "b', 1, 7, '    {"a": "b\n          ^'),
    ],
)
def test_syntax_error_is_a_finding_with_a_caret(
    tmp_path: Path, text: str, line: int, column: int, excerpt: str
) -> None:
    (finding,) = looked_at(tmp_path, text).findings
    assert (finding.level, finding.line, finding.column, finding.excerpt) == ("error", line, column, excerpt)
    assert "not valid JSON" in finding.message


def test_duplicate_key_is_an_error_at_its_second_place(tmp_path: Path) -> None:
    report = looked_at(tmp_path, json.dumps(VALID, indent=1).replace('"stage": 1', '"stage": 1,\n  "stage": 2'))
    (finding,) = [f for f in report.findings if f.level == "error"]
    assert finding.key == "zero_optimization.stage"
    assert finding.line == 14
    assert "given twice in zero_optimization" in finding.message


def test_dialect_is_noted_once_per_kind_and_unquoted_text_is_warned_of(tmp_path: Path) -> None:
    text = json.dumps(VALID, indent=1).replace("{", "{ # one\n // two\n", 1).replace('"AdamW"', "AdamW")
    text = text.replace("AdamW,", "AdamW\n")
    report = looked_at(tmp_path, text)
    assert report.exit_code == 0
    said = {(finding.level, finding.why.partition(":")[0]) for finding in report.findings}
    assert said == {
        ("note", "comment (2 places in this file)"),
        ("note", "missing comma"),
        ("warning", "unquoted text"),
    }


def test_what_the_machine_lacks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatgot.deepspeed_json import machine

    monkeypatch.setattr(machine, "has_package", lambda *names: False)
    monkeypatch.setattr(machine, "has_command", lambda *names: False)
    monkeypatch.setattr(machine, "has_library", lambda name: False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "has_cuda_compiler", lambda: False)
    nvme = {"device": "nvme", "nvme_path": str(tmp_path / "none"), "pin_memory": True}
    changes = {
        "wandb.enabled": True,
        "tensorboard.enabled": True,
        "comet.enabled": True,
        "optimizer.params": {"lr": 1.0, "torch_adam": False},
        "chatgot": {"compile": {"enabled": True}},
        ZERO: {"stage": 3, "offload_param": nvme},
    }
    for facts, kernel in ((GPU, "g++, ninja, nvcc (CUDA toolkit)"), (CPU, "g++, ninja")):
        report = looked_at(tmp_path, changes, facts=facts)
        warned = {finding.key: finding.why for finding in report.findings if finding.level == "warning"}
        assert "wandb is not installed" in warned["wandb.enabled"]
        assert "tensorboard or tensorboardX is not installed" in warned["tensorboard.enabled"]
        assert "comet_ml is not installed" in warned["comet.enabled"]
        assert warned["optimizer.type"].endswith(f"lacks {kernel}")
        assert warned[f"{ZERO}.offload_param.device"].endswith("lacks g++, ninja, libaio")
        assert "no folder" in warned[f"{ZERO}.offload_param.nvme_path"]
        assert warned["chatgot.compile.enabled"].endswith(
            "lacks g++" if facts is CPU else "lacks a C compiler (gcc), so that it stays eager"
        )
    ratio = {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    for params, compiled in (({"torch_adam": True}, False), ({}, True)):
        report = looked_at(tmp_path, {"optimizer.params": params, ZERO: ratio})
        assert any("DeepSpeed's AdamW is compiled at the first start" in f.why for f in report.findings) == compiled
    found = looked_at(tmp_path, {"compile.deepcompile": True, ZERO: {"stage": 3}}).findings
    assert [f.why for f in found if f.key == "compile.deepcompile" and f.level == "warning"] == [
        "DeepCompile is compiled at the first start, and this machine lacks g++, ninja, nvcc (CUDA toolkit)"
    ]
    monkeypatch.undo()
    assert not [f for f in looked_at(tmp_path, {"wandb.enabled": True}).findings if f.key.startswith("wandb")]
