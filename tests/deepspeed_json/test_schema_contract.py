"""The schema against the installed DeepSpeed: a key that was added or removed, or a default that moved, is named.

Pydantic sections are compared by their fields. The others are read by getters, so a dict that remembers what was asked
of it shows what DeepSpeed knows.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime import config as ds_config
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.constants import CHECKPOINT_TAG_VALIDATION_MODES
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.utils.logging import log_levels
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from chatgot.deepspeed_json import optimizers, schema
from chatgot.deepspeed_json.check import effective
from chatgot.deepspeed_json.read import Document
from chatgot.deepspeed_json.resolve import build_engine_config, resolve
from chatgot.deepspeed_json.schema import Key, Section
from chatgot.engine.process_guards import run_muon_uncompiled
from chatgot.errors import ConfigError
from tests.deepspeed_json import generate_keys
from tests.deepspeed_json.conftest import (
    CPU,
    GPU,
    VALID,
    with_keys,
)

TYPED = {name: node for name, node in schema.NODES.items() if isinstance(node, Section) and node.typed}


# --- pydantic sections ---


@pytest.mark.parametrize("name", TYPED)
def test_pydantic_section_has_the_same_keys(name: str) -> None:
    fields = generate_keys.model_of(TYPED[name]).model_fields
    theirs = {n for field, info in fields.items() for n in (field, info.alias) if n}
    ours = set(schema.spellings(TYPED[name]))
    assert ours - theirs == set(), f"{name}: DeepSpeed no longer has these"
    assert theirs - ours == set(), f"{name}: new in DeepSpeed"


@pytest.mark.parametrize("name", TYPED)
def test_pydantic_section_has_the_same_defaults_and_ranges(name: str) -> None:
    model = generate_keys.model_of(TYPED[name])
    documented = schema.spellings(TYPED[name])
    for field, info in model.model_fields.items():
        node = TYPED[name].keys[documented[field]]
        if isinstance(node, Section):
            continue
        default = info.default
        if default is PydanticUndefined:  # a factory
            default = info.default_factory()
            if field == "classes":
                continue  # names of other people's models
        default = {torch.float16: "fp16"}.get(default, default) if not isinstance(default, (list, dict)) else default
        default = getattr(default, "value", default)
        assert node.default == default, f"{name}.{field}: DeepSpeed's default is {default!r}"
        assert (node.default is None) == (default is None), f"{name}.{field}"
        for limit in info.metadata:
            for theirs, ours in (("ge", "low"), ("gt", "above"), ("le", "high"), ("lt", "below")):
                if hasattr(limit, theirs):
                    assert getattr(node, ours) == getattr(limit, theirs), f"{name}.{field}: {theirs}"
        deprecated = bool(info.json_schema_extra and info.json_schema_extra.get("deprecated"))
        assert deprecated == bool(node.instead), f"{name}.{field}: deprecated in DeepSpeed: {deprecated}"


def test_the_keys_are_those_that_the_installed_deepspeed_generates() -> None:
    assert generate_keys.generate() == generate_keys.FILE.read_text(encoding="utf-8")


def test_the_generator_drops_what_deepspeed_has_not_and_takes_its_ranges() -> None:
    section = TYPED["zero_optimization.offload_optimizer"]
    keys = {**section.keys, "gone": Key("int", 1)}
    keys["ratio"] = Key("float", 0.5, "Share.", high=2.0)
    del keys["fast_init"]
    again = generate_keys.updated(dataclasses.replace(section, keys=keys))
    assert "gone" not in again
    assert again["ratio"] == Key("float", 1.0, "Share.", low=0.0, high=1.0)
    assert again["fast_init"] == Key("flag", False)


SCALARS = [
    *(True, False, 0, 1, 2, -3, 0.0, 1.0, 1.5, 5e8),
    *(
        "1",
        "true",
        "TRUE",
        "On",
        "yes",
        "y",
        "t",
        "maybe",
        "2",
        "2.0",
        " 2 ",
        "1_000",
        "5e8",
        "2.5",
        "+3",
        "-3",
        "",
        " true ",
    ),
    *([], {}, [1], "0", "off", "12345678901234567890"),
]


@pytest.mark.parametrize(
    ("dotted", "field"),
    [
        ("zero_optimization.contiguous_gradients", "contiguous_gradients"),
        ("zero_optimization.sub_group_size", "sub_group_size"),
        ("zero_optimization.stage", "stage"),
        ("zero_optimization.stage3_module_granularity_threshold", "module_granularity_threshold"),
        ("zero_optimization.offload_optimizer.ratio", "ratio"),
        ("zero_optimization.offload_optimizer.device", "device"),
        ("wandb.project", "project"),
        ("fp16.hysteresis", "hysteresis"),
        ("fp16.loss_scale", "loss_scale"),
    ],
)
def test_typed_values_are_read_as_pydantic_reads_them(dotted: str, field: str) -> None:
    section, _, key = dotted.rpartition(".")
    model, node = generate_keys.model_of(TYPED[section]), TYPED[section].keys[key]
    assert isinstance(node, Key)
    for value in SCALARS:
        try:
            theirs = getattr(model(**{field: value}), field)
        except ValidationError:
            with pytest.raises(ValueError):  # noqa: PT011 - Key.read says no more than that
                node.read(value, True)
        else:
            ours = node.read(value, True)
            assert ours == theirs, f"{dotted} = {value!r}"


# --- plain getters ---


class Remembering(dict):
    """A dict that remembers which keys were asked for, and with which default."""

    def __init__(self, values: dict[str, Any], asked: dict[str, Any], where: str = "") -> None:
        self.asked, self.where = asked, where
        super().__init__(
            {k: Remembering(v, asked, f"{where}{k}.") if isinstance(v, dict) else v for k, v in values.items()}
        )

    def _ask(self, key: str, default: Any = ...) -> None:
        if self.asked.get(self.where + key, ...) is ...:
            self.asked[self.where + key] = default

    def get(self, key: str, default: Any = None) -> Any:
        self._ask(key, default)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._ask(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self._ask(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return _Keys(self)


class _Keys:
    def __init__(self, owner: Remembering) -> None:
        self.owner = owner

    def __contains__(self, key: object) -> bool:
        return key in self.owner

    def __iter__(self) -> Iterator[str]:
        return iter(dict.keys(self.owner))


def asked_of(tree: dict[str, Any]) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    ds_config.DeepSpeedConfig(Remembering(tree, asked))
    return asked


PLAIN: dict[str, Any] = {
    "train_batch_size": 1,
    "optimizer": {"type": "AdamW"},
    "scheduler": {"type": "WarmupLR"},
    "torch_autocast": {"enabled": False},
    "data_types": {},
    "activation_checkpointing": {},
    "checkpoint": {"parallel_write": {}, "writer": {"type": "fast"}},
    "flops_profiler": {},
    "timers": {},
    "aio": {},
    "data_efficiency": {
        "data_sampling": {"curriculum_learning": {}, "dynamic_batching": {}},
        "data_routing": {"random_ltd": {}},
    },
    "autotuning": {"model_info": {}},
    "expert_parallel": {"enabled": False},
}


def test_deepspeed_asks_for_no_key_that_the_schema_lacks() -> None:
    typed = tuple(f"{name}." for name in TYPED)
    unknown = {
        name
        for name in asked_of(PLAIN)
        if name not in schema.NODES and name not in schema.REMOVED and not name.startswith(typed) and name != "bfloat16"
    }
    # random_ltd and curriculum_learning are refused when enabled, and open otherwise
    assert {name for name in unknown if ".random_ltd." not in name and ".curriculum_learning." not in name} == set()


def test_schema_has_no_key_that_deepspeed_never_asks_for() -> None:
    asked = set(asked_of(PLAIN)) | {"pipeline." + key for key in ds_config.get_pipeline_config({})}
    typed = tuple(f"{name}." for name in TYPED)
    elsewhere = {
        "chatgot": "ours",
        "data_parallel_size": "deepspeed/__init__.py",
        "sequence_parallel_size": "deepspeed/__init__.py",
        "allgather_size": "deepspeed/runtime/zero/config.py",
        "data_efficiency.data_sampling.dynamic_batching.metrics_path": "deepspeed/runtime/data_pipeline/constants.py",
        "data_efficiency.data_sampling.dynamic_batching.max_tokens": "deepspeed/runtime/data_pipeline/constants.py",
    }
    root = Path(deepspeed.__file__).parent.parent
    for name, file in elsewhere.items():
        assert file == "ours" or f'"{name.rpartition(".")[2]}"' in (root / file).read_text(encoding="utf-8"), (
            f"{name} is gone from {file}"
        )
    ours = {name for name in schema.NODES if not name.startswith(typed) and name not in elsewhere}
    wildcard = {name for name in ours if name.startswith("data_efficiency.data_sampling.dynamic_batching.")}
    assert {name for name in ours - wildcard if name not in asked} == set(), "DeepSpeed never asks for these"


def test_plain_defaults_are_deepspeeds() -> None:
    for name, default in asked_of(PLAIN).items():
        node = schema.NODES.get(name)
        if default is ... or isinstance(default, dict) or not isinstance(node, Key) or name in ("train_batch_size",):
            continue
        ours = node.default.lower() if isinstance(node.default, str) and node.fold_case else node.default
        theirs = default.lower() if isinstance(default, str) and node.fold_case else default
        if node.auto and theirs == "auto":
            theirs = None
        if name == "pipeline.stages":
            continue
        assert ours == theirs, f"{name}: DeepSpeed's default is {default!r}"


def test_removed_keys_are_deepspeeds_list() -> None:
    theirs = set(ds_config._REMOVED_TOP_LEVEL_CONFIG_KEYS) | {
        f"zero_optimization.{key}" for key in ds_config._REMOVED_ZERO_CONFIG_KEYS
    }
    assert set(schema.REMOVED) == theirs


def test_names_of_types_modes_and_levels_are_deepspeeds() -> None:
    for names, dtype in (
        (schema.FP16_NAMES, torch.float16),
        (schema.BF16_NAMES, torch.bfloat16),
        (schema.FP32_NAMES, torch.float32),
    ):
        assert set(names) == set(ds_config.DtypeEnum(dtype)._all_values[1:])  # type: ignore[attr-defined]
    level, validation = schema.NODES["log_level"], schema.NODES["checkpoint.tag_validation"]
    assert isinstance(level, Key) and isinstance(validation, Key)  # noqa: PT018
    assert {choice.upper() for choice in validation.choices} == set(CHECKPOINT_TAG_VALIDATION_MODES)
    assert set(level.choices) == set(log_levels)


# --- optimizers, schedulers ---


def arguments(function: Any, but: tuple[str, ...]) -> set[str]:
    return {
        name for name in inspect.signature(function).parameters if name not in ("self", "params", "model_params", *but)
    }


def test_optimizer_names_are_deepspeeds() -> None:
    assert set(optimizers.DEEPSPEED_OPTIMIZERS) == set(ds_config.DEEPSPEED_OPTIMIZERS)
    torch_names = {
        name
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    ours = set(optimizers.TORCH_OPTIMIZERS) | set(optimizers.REFUSED_OPTIMIZERS)
    assert {name for name in torch_names - ours if name.lower() not in optimizers.DEEPSPEED_OPTIMIZERS} == set(), (
        "new in torch.optim"
    )
    assert set(optimizers.TORCH_OPTIMIZERS) - torch_names == set(), "gone from torch.optim"


def test_optimizers_tested_with_zero_are_deepspeeds() -> None:
    names = {cls.__name__ for cls in zero_utils.ZERO_SUPPORTED_OPTIMIZERS}
    expected = {"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam", "ZenFlowCPUAdam", "Adagrad", "DeepSpeedCPUAdagrad"}
    assert names - {"MuonWithAuxAdam"} == expected | {"DeepSpeedCPULion", "FusedLion"}


@pytest.mark.parametrize("entry", [name for name in schema.OPTIMIZER_PARAMS if name.startswith("torch.")])
def test_torch_optimizer_arguments(entry: str) -> None:
    assert set(schema.OPTIMIZER_PARAMS[entry]) == arguments(
        getattr(torch.optim, entry.removeprefix("torch.")).__init__, ()
    )


@pytest.mark.parametrize("entry", generate_keys.OPTIMIZERS)
def test_deepspeed_optimizer_arguments(entry: str) -> None:
    hidden = {"adam/cpu": ("adamw_mode",), "lamb": ("max_grad_norm",)}.get(entry, ())
    theirs = arguments(generate_keys.class_of(entry).__init__, hidden)
    switches = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"} if entry.startswith("adam/") else set()
    assert set(schema.OPTIMIZER_PARAMS[entry]) == theirs | switches


def test_muon_arguments() -> None:
    theirs = {*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS, "muon_lr", "adam_lr", "per_head_muon"}
    assert set(schema.OPTIMIZER_PARAMS["muon"]) == theirs | {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}


def test_muon_defaults() -> None:
    run_muon_uncompiled()
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    groups = [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "use_muon": use_muon} for use_muon in (True, False)]
    theirs: dict[str, Any] = {}
    for group in MuonWithAuxAdam(groups).param_groups:
        theirs |= group
    ours = {name: node.default for name, node in schema.OPTIMIZER_PARAMS["muon"].items() if name != "lr"}
    both = ours.keys() & theirs
    assert both == {"momentum", "weight_decay", "ns_method", "betas", "eps"}
    assert {name: ours[name] for name in both} == {
        name: list(value) if isinstance(value := theirs[name], tuple) else value for name in both
    }


@pytest.mark.parametrize(
    ("kind", "argument", "default"),
    [
        *(("Adadelta", "lr", 1.0), ("Adagrad", "lr", 0.01), ("ASGD", "lr", 0.01), ("RMSprop", "lr", 0.01)),
        *(("Rprop", "lr", 0.01), ("Adafactor", "lr", 0.01), ("Adamax", "lr", 0.002), ("NAdam", "lr", 0.002)),
        *(("SGD", "lr", 0.001), ("AdamW", "lr", 0.001), ("Lamb", "lr", 0.001), ("Lion", "lr", 0.001)),
        *(("Adagrad", "eps", 1e-10), ("Adadelta", "eps", 1e-6), ("Rprop", "etas", [0.5, 1.2])),
    ],
)
def test_default_that_is_not_stated_is_the_classs(kind: str, argument: str, default: Any) -> None:
    tree = with_keys({"optimizer": {"type": kind}, "zero_allow_untested_optimizer": True}, VALID)
    ours = resolve(Document(tree), world_size=1, facts=GPU)
    shown = {value.key: value.value for value in effective(ours)}
    assert shown[f"optimizer.params.{argument}"] == default
    if argument == "lr":
        assert f"is not stated: the default is {default:g}" in [finding.why for finding in ours.findings.all]


@pytest.mark.parametrize(
    ("params", "decay"),
    [({"torch_adam": True}, 0.01), ({"torch_adam": True, "adam_w_mode": False}, 0.0), ({}, 0.0)],
)
def test_default_decay_of_adam(params: dict[str, Any], decay: float) -> None:
    ours = resolve(Document(with_keys({"optimizer": {"type": "Adam", "params": params}})), world_size=1, facts=GPU)
    assert {value.key: value.value for value in effective(ours)}["optimizer.params.weight_decay"] == decay


@pytest.mark.parametrize("name", schema.SCHEDULER_PARAMS)
def test_scheduler_arguments(name: str) -> None:
    cls = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name)
    theirs = arguments(cls.__init__, ("optimizer", "scale_fn", "verbose"))
    assert set(schema.SCHEDULER_PARAMS[name]) == theirs
    required = {
        n
        for n, p in inspect.signature(cls.__init__).parameters.items()
        if p.default is p.empty and n not in ("self", "optimizer")
    }
    assert {n for n, key in schema.SCHEDULER_PARAMS[name].items() if key.required} == required


def test_no_scheduler_is_forgotten() -> None:
    theirs = set(lr_schedules.VALID_LR_SCHEDULES) | {
        name
        for name, cls in vars(torch.optim.lr_scheduler).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert theirs - set(schema.SCHEDULER_PARAMS) - set(optimizers.REFUSED_SCHEDULERS) - {"LRScheduler"} == set()


# --- what we accept, they accept ---


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_clipping": ...},
        {"zero_optimization": {"stage": "2", "overlap_comm": "false", "reduce_bucket_size": 5e8}},
        {"zero_optimization": True, "allgather_size": 10},
        {"zero_optimization": {"stage": 3, "cpu_offload": True, "cpu_offload_param": True}},
        {"bfloat16": {"enabled": "yes"}, "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": ["norm"]}},
        {"fp16": {"enabled": True, "loss_scale": "128"}},
        {"torch_autocast": {"enabled": True, "dtype": "half"}, "zero_optimization.stage": 0},
        {
            "checkpoint": {"tag_validation": "ignore", "writer": None},
            "activation_checkpointing": {},
            "aio": None,
            "comms_logger": {},
        },
        {"zero_optimization": {"stage": 1, "leaf_module": {"classes": "a.b"}, "offload_param": None}},
        {"scheduler": {"type": "WarmupLR", "params": {}}, "log_level": "ERROR", "prescale_gradients": None},
    ],
)
def test_what_is_accepted_here_is_accepted_by_deepspeed(changes: dict[str, Any]) -> None:
    tree = with_keys(changes, VALID)
    ours = build_engine_config(tree, "ds.json", world_size=1, facts=GPU, n_params=100)
    for configuration in (tree, ours.deepspeed):
        theirs = ds_config.DeepSpeedConfig(configuration)
        assert theirs.train_batch_size == ours.train_batch_size
        assert theirs.train_micro_batch_size_per_gpu == ours.micro_batch_size
        assert theirs.gradient_accumulation_steps == ours.accumulation
        assert theirs.gradient_clipping == ours.gradient_clipping
        assert theirs.zero_config.stage == ours.zero_stage
        assert theirs.bfloat16_config.enabled == (ours.precision == "bf16")
        assert theirs.float16_config.enabled == (ours.precision == "fp16")


ODD = [
    None,
    True,
    False,
    0,
    1,
    2,
    3,
    -1,
    1.5,
    1e9,
    "auto",
    "",
    "x",
    "true",
    "1",
    "cpu",
    "bf16",
    "Fail",
    [],
    [1],
    ["a"],
    [0.9, 0.99],
    {},
]
ODD += [{"enabled": True}, {"device": "cpu"}, {"type": "AdamW"}, 10**30, float("inf"), float("nan")]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(list(schema.NODES)), st.sampled_from(ODD)), min_size=1, max_size=3))
def test_whatever_is_accepted_here_is_accepted_by_deepspeed_and_read_back(keys: list[tuple[str, Any]]) -> None:
    tree = copy.deepcopy(VALID)
    for dotted, value in keys:
        *sections, key = dotted.split(".")
        here = tree
        for section in sections:
            here = here.setdefault(section, {})
            if not isinstance(here, dict):
                return  # an earlier key put something else here
        here[key] = copy.deepcopy(value)
    try:
        ours = build_engine_config(tree, "ds.json", world_size=1, facts=CPU, n_params=1001)
    except ConfigError:
        return
    theirs = ds_config.DeepSpeedConfig(copy.deepcopy(ours.deepspeed))
    assert theirs.train_batch_size == ours.train_batch_size
    assert theirs.zero_config.stage == ours.zero_stage
    assert build_engine_config(ours.to_dict(), "ds.json", world_size=1, facts=CPU) == ours
