"""`chatgot check` as a program: exit codes, formats, overrides, effective configuration, explanations, and how little
it imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from chatgot import cli
from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.check import Effective, check
from chatgot.deepspeed_json.explain import explain, sentences, verdict_table
from chatgot.deepspeed_json.findings import Findings, shown
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.errors import ConfigError
from tests.deepspeed_json import generate_tables
from tests.deepspeed_json.conftest import GPU, VALID, with_keys
from tests.support import ROOT, environment

SHIPPED = ROOT / "ds_configs" / "bf16_zero2.json"
HEAVY = ("torch", "deepspeed", "numpy", "wandb", "transformers")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `chatgot check`; exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["check", *map(str, words)])
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


# --- the program ---


def test_clean_file_ends_with_0_and_broken_one_with_2(run, write) -> None:
    assert run(SHIPPED, "--device", "cuda")[:2] == (0, f"{SHIPPED}: nothing to say\n")
    path = write(json.dumps(with_keys({"gradient_cliping": 1.0, "zero_optimization.overlap_comm": True}), indent=2))
    code, out, err = run(path)
    assert (code, err) == (2, "")
    assert out.splitlines() == [
        f"{path}:21:3: error: gradient_cliping = 1",
        "    unknown key, DeepSpeed would ignore it",
        "    did you mean 'gradient_clipping'?",
        f"{path}:14:5: warning: zero_optimization.overlap_comm = true",
        "    races were reported at ZeRO stage 1 (DeepSpeed #8061, #5545), with NaN or slow divergence; false is safer",
        f"{path}: 1 error, 1 warning",
    ]


def test_strict_makes_every_warning_an_error_and_nothing_else(run, write) -> None:
    path = write(with_keys({"author": "x", "_comment": "y", "optimizer": ..., "zero_optimization.stage": 1}))
    words = (path, "--device", "cuda")
    code, out, _ = run(*words)
    assert (code, out.splitlines()[-1]) == (0, f"{path}: 1 adapted, 1 warning, 1 note")
    code, out, _ = run(*words, "--strict")
    assert (code, out.splitlines()[-1]) == (2, f"{path}: 1 error, 1 adapted, 1 note")
    assert (
        "    no key of DeepSpeed, which ignores it, and so does ChatGoT (a warning, refused because of --strict)" in out
    )
    lacks = write(
        with_keys({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}})
    )
    assert run(lacks, "--device", "cuda", "--strict")[0] == 0
    assert "is no folder that this machine can write to" in run(lacks, "--device", "cuda", "--strict")[1]
    guessed = Findings("ds.json", strict=True)
    guessed.add("warning", "bf16.enabled", True, "seen from this machine", of_machine=True)
    assert guessed.at_level("error") == []
    late = write(with_keys({"chatgot": {"schedule": {"warmup_steps": 5000}}}))
    assert run(late, "--device", "cuda", "--config", "tiny")[0] == 0
    assert run(late, "--device", "cuda", "--config", "tiny", "--strict")[0] == 2


def test_json_format_is_for_programs(run, write) -> None:
    path = write(json.dumps(with_keys({"zero_optimization.stage": 4}), indent=2))
    code, out, _ = run(path, "--format", "json", "--effective")
    report = json.loads(out)
    assert code == report["exit_code"] == 2
    assert report["counts"] == {"error": 1, "adapted": 0, "warning": 0, "note": 0}
    assert report["findings"] == [
        {
            "level": "error",
            "file": str(path),
            "line": 13,
            "column": 5,
            "key": "zero_optimization.stage",
            "value": 4,
            "given": True,
            "allowed": "one of 0, 1, 2, 3",
            "suggestion": None,
            "why": "DeepSpeed refuses it",
            "message": "DeepSpeed refuses it; expected one of 0, 1, 2, 3",
        }
    ]
    assert {"key": "train_batch_size", "value": 8, "source": "file", "where": f"{path}:2"} in report["effective"]


def test_overrides_ranks_device_and_model_change_what_is_found(run) -> None:
    code, out, _ = run(SHIPPED, "--world_size", 3, "--device", "cuda")
    assert code == 2
    assert "train_batch_size = 24 or train_batch_size = 36" in out
    code, out, _ = run(SHIPPED, "--device", "cuda", "--set", "ds.bf16.enabled=yes please", "ds.gradient_clipping=-1")
    assert code == 2
    assert 'override: error: ds.bf16.enabled = "yes please"' in out
    assert "override: error: ds.gradient_clipping = -1" in out
    assert run(SHIPPED, "--set", "ds.train_batch_size=64", "--set", "ds.gradient_clipping=0.5")[0] == 0
    big = ("--set", "ds.zero_optimization.reduce_bucket_size=500000000", "--device", "cuda")
    assert "beyond the model" not in run(SHIPPED, *big)[1]
    assert "beyond the model's 918,912 parameters: a buffer of 0.93 GiB" in run(SHIPPED, *big, "--config", "tiny")[1]
    assert "beyond the model's 14,359,936" in run(SHIPPED, *big, "--config", "modern_14M")[1]
    assert "beyond the model's 1,082,752" in run(SHIPPED, *big, "--config", "tiny", "--vocab_size", "896")[1]
    fp16 = ROOT / "ds_configs" / "fp16_zero2.json"
    assert run(fp16, "--device", "cpu")[0] == 2
    assert run(fp16, "--device", "cuda")[0] == 0


def test_what_is_wrong_around_the_file_is_listed_too(run, tmp_path: Path) -> None:
    code, out, _ = run(SHIPPED, "--set", "ds.gradient_cliping=1", "model.n_layers=x", "--format", "json")
    assert code == 2
    places = [(finding["file"], finding["why"]) for finding in json.loads(out)["findings"]]
    assert places[0][0] == "--set"
    assert "did you mean 'ds.gradient_clipping'" in places[0][1]
    code, out, _ = run(SHIPPED, "--config", "tinny")
    assert code == 2
    assert "did you mean 'tiny'" in out
    code, out, _ = run(tmp_path / "none.json")
    assert code == 2
    assert "no such file" in out
    assert run()[0] == run(SHIPPED, "--world_size", "0")[0] == 2


def test_check_imports_nothing_heavy() -> None:
    words = [
        "check",
        str(SHIPPED),
        "--config",
        "modern_14M",
        "--effective",
        "--format",
        "json",
        "--set",
        "ds.gradient_clipping=0.5",
    ]
    program = f"""
import sys
from chatgot.cli import main
try:
    main({words!r})
except SystemExit as end:
    print(end.code, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stderr == "0 []\n"


def test_train_and_check_say_the_same(write) -> None:
    tree = with_keys({"gradient_cliping": 2, "zero_optimization.offload_param": {"device": "cpu"}})
    path = write(tree)
    errors = [
        finding.text for finding in check(str(path), world_size=1, facts=GPU).findings if finding.level == "error"
    ]
    with pytest.raises(ConfigError) as refused:
        build_engine_config(tree, str(path), world_size=1, facts=GPU)
    assert sorted(str(refused.value).splitlines()) == sorted(
        error.replace(f"{path}:1:", f"{path}:") for error in errors
    )


def test_warnings_and_notes_reach_the_run(read) -> None:
    config = read({"zero_optimization.overlap_comm": True, "gradient_clipping": ...})
    assert [finding.level for finding in config.findings] == ["warning", "note"]
    assert [note.partition(": ")[0] for note in config.notes][-2:] == ["warning", "note"]


# --- the effective configuration ---


def sources(path: Path, overrides: dict[str, Any] | None = None, **more: Any) -> dict[str, Effective]:
    report = check(str(path), overrides, **{"world_size": 2, "facts": GPU, "n_params": 1001, **more})
    values = report.effective()
    assert len({value.key for value in values}) == len(values)
    return {value.key: value for value in values}


def test_every_value_has_its_source(write) -> None:
    changes = {
        "bf16.enabled": "auto",
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "prefetch_bucket_size": 5},
    }
    path = write(json.dumps(with_keys({**changes, "activation_checkpointing": {}, "gradient_clipping": ...}), indent=1))
    found = sources(path, {"optimizer.params.lr": 0.5, "chatgot.schedule.type": "wsd"})
    expected = {
        "train_batch_size": (8, "file", f"{path}:2"),
        "gradient_accumulation_steps": (1, "derived", "8 samples / 4 per rank / 2 ranks"),
        "optimizer.params.lr": (0.5, "override", "override ds.optimizer.params.lr"),
        "optimizer.params.eps": (1e-8, "default", "AdamW"),
        "optimizer.params.weight_decay": (0.01, "default", "AdamW"),
        "gradient_clipping": (1.0, "derived", "not given, DeepSpeed's default since 2026"),
        "bf16.enabled": (True, "derived", '"auto", H100 supports bf16'),
        "bf16.check_grad_overflow": (True, "derived", "not given, DeepSpeed's default since 2026"),
        "zero_optimization.reduce_bucket_size": (1002, "derived", '"auto", the model\'s 1,001 parameters'),
        "zero_optimization.prefetch_bucket_size": (5, "file", f"{path}:14"),
        "zero_optimization.overlap_comm": (True, "derived", "null: on at stage 3 only"),
        "zero_optimization.sub_group_size": (1_000_000_000, "default", "DeepSpeed 0.19.8"),
        "communication_data_type": ("bf16", "derived", "null: the training precision"),
        "hybrid_engine.enabled": (False, "default", "DeepSpeed 0.19.8"),
        "chatgot.schedule.type": ("wsd", "override", "override ds.chatgot.schedule.type"),
        "chatgot.schedule.warmup_steps": (100, "default", "ChatGoT"),
        "chatgot.activation_checkpointing.backend": ("torch", "derived", '"auto", nothing needs DeepSpeed\'s'),
    }
    assert {key: (found[key].value, found[key].source, found[key].where) for key in expected} == expected
    for idle in (
        "hybrid_engine.max_out_tokens",
        "fp16.loss_scale",
        "pipeline.stages",
        "zero_optimization.round_robin_gradients",
        "aio.block_size",
    ):
        assert idle not in found


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_effective_values_are_those_that_deepspeed_uses(path: Path) -> None:
    config = build_engine_config(
        json.loads(path.read_text(encoding="utf-8")), str(path), world_size=1, facts=GPU, n_params=1001
    )
    stock = DeepSpeedConfig(config.deepspeed)
    found = sources(path, world_size=1)
    sections = {"zero_optimization": stock.zero_config, "bf16": stock.bfloat16_config, "fp16": stock.float16_config}
    compared = 0
    for section, model in sections.items():
        documented = {spelling: name for name, spelling in _field_names(type(model)).items()}
        for key, value in found.items():
            owner, _, name = key.rpartition(".")
            if owner == section:
                compared += 1
                assert getattr(model, documented[name]) == value.value, key
    assert compared > 2
    scalars = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "steps_per_print",
    )
    for name in scalars:
        assert getattr(stock, name) == found[name].value


def _field_names(model: Any) -> dict[str, str]:
    return {name: info.alias or name for name, info in model.model_fields.items()}


def test_values_of_a_broken_file_are_shown_as_far_as_they_go(write) -> None:
    found = sources(
        write(
            with_keys(
                {
                    "optimizer": {"type": 3, "params": {"lr": 1}},
                    "train_batch_size": 9,
                    "scheduler": {"params": 4},
                    "wandb": 5,
                }
            )
        )
    )
    assert found["zero_optimization.stage"].value == 1
    assert "gradient_accumulation_steps" in found


# --- explanations ---


def test_every_key_has_an_explanation() -> None:
    keys = schema.dotted_names()
    assert len(keys) > 450
    for key in keys:
        does, default, relations = sentences(key)
        lines = relations.splitlines()
        assert len(lines) == len(set(lines)), f"{key}: nothing is said twice"
        assert len(does) > 3, key
        assert does != "Turn it on.", key
        assert default.startswith(("Default ", "Keys: ")), key
        assert len(relations) > 10, key
    assert set(schema.NODES) <= set(keys)


def test_explanation_names_default_values_and_relations() -> None:
    text = explain("ds.zero_optimization.overlap_comm")
    assert text.splitlines() == [
        "zero_optimization.overlap_comm",
        "  Reduce gradients during backward; null: only at stage 3.",
        "  Default null; allowed: true or false or null.",
        "  DeepSpeed reads it at ZeRO stages 1, 2, 3 only.",
        "  May be warned of: races were reported at ZeRO stage <stage> (DeepSpeed #8061, #5545), with NaN or slow",
        "    divergence; false is safer.",
    ]
    assert explain("overlap_comm") == text
    assert "ZeRO stage 3 only" in explain("stage3_max_live_parameters")
    assert "not supported by ChatGoT" in explain("hybrid_engine.max_out_tokens")
    assert "deprecated" in explain("zero_optimization.cpu_offload")
    assert "May be adapted: is not passed on: it works from ZeRO stage <first> on" in explain("cpu_offload")
    assert "May be adapted: is not passed on: a resume takes any checkpoint" in explain("checkpoint.load_universal")
    assert shown(0.01) in explain("optimizer.params.min_coeff")
    assert "Optimizer steps between saves" in explain("chatgot.checkpoint.every_steps")
    assert explain("bfloat16") == explain("bf16")
    assert "Muon does not work with optimizer offload" in explain("optimizer.type")
    assert "See optimizer.type: DeepSpeed did not test it with ZeRO" in explain("zero_allow_untested_optimizer")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("overlap_com", "did you mean 'overlap_comm'"),
        ("zero_optimization.stagee", "did you mean 'zero_optimization.stage'"),
        ("enabled", "several keys end like this: fp16.enabled"),
        ("elasticity", "removed from DeepSpeed"),
    ],
)
def test_unknown_key_is_not_explained(run, key: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        explain(key)
    code, out, err = run("--explain", key)
    assert (code, out) == (2, "")
    assert said in err


def test_keys_of_the_run_yaml_are_explained_too(run) -> None:
    code, out, _ = run("--explain", "max_steps")
    assert code == 0
    assert out.splitlines()[0] == "train.max_steps"
    assert "Optimizer steps in all" in out
    assert "Default 1000; allowed: a whole number (>= 1)." in out
    assert "It stands in the run YAML (--config)." in out
    assert "Keys: tokenizer, " in run("--explain", "data")[1]
    assert "did you mean 'train.seed'?" in run("--explain", "train.sed")[2]


def test_a_warmup_longer_than_the_run_is_found(run) -> None:
    code, out, _ = run(SHIPPED, "--config", "tiny", "train.max_steps=50", "--device", "cuda")
    assert code == 0
    assert "warning: chatgot.schedule.warmup_steps = 100\n    the run ends at train.max_steps = 50, before" in out
    assert "nothing to say" in run(SHIPPED, "--config", "tiny", "train.max_steps=100", "--device", "cuda")[1]


def test_a_run_yaml_in_place_of_the_json_is_said_once(run, tmp_path: Path) -> None:
    for name in ("run.yaml", "run.json"):
        (tmp_path / name).write_text((ROOT / "chatgot" / "presets" / "tiny.yaml").read_text())
        code, out, _ = run(tmp_path / name)
        assert code == 2
        assert "not a DeepSpeed JSON; --config takes" in out
        assert out.endswith(": 1 error\n")


@pytest.mark.parametrize("file", generate_tables.FILES, ids=lambda file: file.parent.name)
def test_the_tables_of_verdicts_are_those_of_the_rules(file: Path) -> None:
    assert generate_tables.generate(file) == file.read_text(encoding="utf-8"), (
        "python -m tests.deepspeed_json.generate_tables"
    )


def test_the_table_of_verdicts_has_every_key_once(run) -> None:
    code, out, _ = run("--rules")
    assert (code, out) == (0, verdict_table(with_reasons=True) + "\n")
    rows = [line.strip("| ").split(" | ") for line in out.splitlines()[2:]]
    keys = [(row[0], key.strip("`")) for row in rows for key in row[1].split(", ")]
    short = [line.strip("| ").split(" | ") for line in verdict_table(with_reasons=False).splitlines()[2:]]
    listed = [(verdict, key) for verdict, names in short for key in names.split(", ")]
    assert len(listed) == len(set(listed)) == len(set(keys))
    top = {key.partition(".")[0] for verdict, key in keys if "." in key or verdict != "adapted"}
    assert top >= {name for name in schema.ROOT.keys if name != "chatgot"}
    passed = {key for verdict, key in keys if verdict == "passed on"}
    assert {"zero_optimization", "bf16", "optimizer", "wandb"} <= passed
    assert not {"hybrid_engine", "sequence_parallel_size", "pipeline", "tensor_parallel", "chatgot"} & passed
    assert {("refused", "zero_optimization.zenflow"), ("adapted", "checkpoint.load_universal")} <= set(keys)


def test_explain_needs_no_file(run) -> None:
    code, out, _ = run("--explain", "zero_optimization.stage")
    assert code == 0
    assert out.startswith("zero_optimization.stage\n")


def test_valid_is_valid(write) -> None:
    assert check(str(write(VALID)), world_size=1, facts=GPU).findings == ()
