"""What a JSON trains under stock DeepSpeed it trains here: the same losses, weights and side effects, or it is adapted
and says so.

The stock side is `deepspeed.initialize` with the JSON as it stands, and forward, backward and step by hand; with it go
our two parameter groups, since which weights decay is the model's business.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import ROOT, run_ranks

STEPS, LONG_STEPS = 12, 20
BATCH = 8
ADAMW = {
    "type": "AdamW",
    "params": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True},
}
EACH = {**ADAMW, "params": {**ADAMW["params"], "foreach": True}}
"""The same arithmetic on both sides: torch's fused AdamW rounds differently, which bf16 weights show."""
EXACT = 5e-7
"""Relative, of every loss and of every weight matrix."""
ZERO = "zero_optimization"
TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
OFFLOAD = {"device": "cpu", "pin_memory": False}
SHARED_OUT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 50_000,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
"""Otherwise stage 3 keeps every parameter of so small a model whole on every rank."""


def tree(stage: int = 0, zero: dict[str, Any] | None = None, micro: int = 4, **top: Any) -> dict[str, Any]:
    """A JSON for one or two ranks; `top` replaces top-level keys, None takes one out."""
    zero_optimization = {
        "stage": stage,
        "reduce_bucket_size": 50_000,
        "allgather_bucket_size": 50_000,
        **(SHARED_OUT if stage == 3 else {}),
        **(zero or {}),
    }
    whole = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": 1.0,
        "optimizer": ADAMW,
        "zero_optimization": zero_optimization,
        **top,
    }
    return {key: value for key, value in whole.items() if value is not None}


def optimizer(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": params}, "zero_allow_untested_optimizer": True}


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


BF16 = {"bf16": {"enabled": True}, "optimizer": EACH}
MUON = optimizer("Muon", muon_lr=0.02, adam_lr=3e-3, torch_adam=True)
BF16_MASTERS = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
AUTOCAST = {"enabled": True, "dtype": "bfloat16"}
FP32_SUMS = {"grad_accum_dtype": "fp32"}

SHORT: dict[str, dict[str, Any]] = {
    **{f"stage {stage}": tree(stage) for stage in range(4)},
    "stage 2, optimizer on the CPU": tree(2, {"offload_optimizer": OFFLOAD}),
    "stage 1, clipping at 0.05": tree(1, gradient_clipping=0.05),
    "stage 0, no clipping": tree(0, gradient_clipping=0.0),
    "stage 2, 4 micro-batches": tree(2, micro=1),
    "stage 2, bf16": tree(2, **BF16),
    "stage 1, bf16, fp32 accumulation": tree(1, **BF16, data_types=FP32_SUMS),
    "stage 3, thresholds": tree(3, {"stage3_param_persistence_threshold": 1000, "stage3_max_live_parameters": 5000}),
    "stage 0, SGD": tree(0, **optimizer("SGD", lr=0.1, momentum=0.9)),
    "stage 1, WarmupLR": tree(1, **scheduler("WarmupLR", warmup_max_lr=3e-3, warmup_num_steps=8)),
    "stage 0, OneCycle": tree(
        0, **scheduler("OneCycle", cycle_min_lr=1e-4, cycle_max_lr=4e-3, cycle_first_step_size=9)
    ),
    "stage 2, recomputed by torch": tree(2, activation_checkpointing={"partition_activations": False}),
}
"""Of `make test`."""

LONG: dict[str, dict[str, Any]] = {
    **{f"stage {stage}, clipping at 0.05": tree(stage, gradient_clipping=0.05) for stage in (0, 2, 3)},
    **{f"stage {stage}, no clipping": tree(stage, gradient_clipping=0.0) for stage in (1, 2, 3)},
    **{f"stage {stage}, 4 micro-batches": tree(stage, micro=1) for stage in (0, 1, 3)},
    **{f"stage {stage}, optimizer on the CPU": tree(stage, {"offload_optimizer": OFFLOAD}) for stage in (1, 3)},
    "stage 3, parameters on the CPU": tree(3, {"offload_param": OFFLOAD}),
    "stage 3, both on the CPU": tree(3, {"offload_param": OFFLOAD, "offload_optimizer": OFFLOAD}),
    "stage 2, cpu_offload": tree(2, {"cpu_offload": True}),
    # reduction
    "stage 0, prescaled": tree(0, prescale_gradients=True, gradient_predivide_factor=2.0),
    "stage 0, predivided": tree(0, gradient_predivide_factor=4.0),
    "stage 1, predivided": tree(1, {"reduce_scatter": False}, gradient_predivide_factor=2.0),
    **{f"stage {stage}, sum": tree(stage, gradient_allreduce_op="sum") for stage in (0, 1, 2)},
    **{f"stage {stage}, no reduce_scatter": tree(stage, {"reduce_scatter": False}) for stage in (1, 2, 3)},
    **{f"stage {stage}, not contiguous": tree(stage, {"contiguous_gradients": False}) for stage in (1, 2, 3)},
    **{f"stage {stage}, overlap_comm": tree(stage, {"overlap_comm": True}) for stage in (1, 2, 3)},
    **{f"stage {stage}, small buckets": tree(stage, {"reduce_bucket_size": 1000}) for stage in (1, 2, 3)},
    **{f"stage {stage}, one bucket": tree(stage, {"reduce_bucket_size": 500_000}) for stage in (1, 2)},
    **{f"stage {stage}, small allgather": tree(stage, {"allgather_bucket_size": 2000}) for stage in (1, 2)},
    **{f"stage {stage}, round robin": tree(stage, {"round_robin_gradients": True}) for stage in (1, 2)},
    "stage 1, one rank a bucket": tree(1, {"use_multi_rank_bucket_allreduce": False}),
    "stage 2, no norm": tree(2, {"compute_grad_norm": False}, gradient_clipping=0.0),
    "stage 2, unused refused": tree(2, {"ignore_unused_parameters": False}),
    # stage 3
    "stage 3, persistent": tree(3, {"stage3_param_persistence_threshold": 100_000}),
    "stage 3, few persistent": tree(3, {"stage3_model_persistence_threshold": 2000}),
    "stage 3, much alive": tree(3, {"stage3_max_live_parameters": 10**9, "stage3_max_reuse_distance": 10**9}),
    "stage 3, no prefetch": tree(3, {"stage3_prefetch_bucket_size": 0}),
    "stage 3, small sub-groups": tree(3, {"sub_group_size": 3000}),
    "stage 3, all-reduce to fetch": tree(3, {"stage3_use_all_reduce_for_fetch_params": True}),
    "stage 3, one after another": tree(3, {"stage3_allgather_sequential": True}),
    "stage 3, coarse modules": tree(3, {"stage3_module_granularity_threshold": 500}),
    "stage 3, whole blocks": tree(3, {"leaf_module": {"classes": ["chatgot.model.gpt.Block"]}}),
    "stage 3, no efficient linear": tree(3, {"memory_efficient_linear": False}),
    # optimizers
    "stage 2, Adam with L2": tree(
        2, **optimizer("Adam", lr=3e-3, adam_w_mode=False, weight_decay=0.1, torch_adam=True)),
    "stage 0, amsgrad": tree(0, **optimizer("AdamW", lr=3e-3, amsgrad=True, weight_decay=0.1, torch_adam=True)),
    "stage 2, SGD": tree(2, **optimizer("SGD", lr=0.1, momentum=0.9, nesterov=True)),
    "stage 0, RMSprop": tree(0, **optimizer("RMSprop", lr=1e-3, alpha=0.95)),
    "stage 1, RMSprop": tree(1, **optimizer("RMSprop", lr=1e-3, momentum=0.5)),
    "stage 0, RAdam": tree(0, **optimizer("RAdam", lr=3e-3)),
    "stage 2, NAdam": tree(2, **optimizer("NAdam", lr=3e-3)),
    "stage 1, Adamax": tree(1, **optimizer("Adamax", lr=3e-3)),
    "stage 0, Adadelta": tree(0, **optimizer("Adadelta", lr=1.0)),
    **{f"stage {stage}, Adagrad": tree(stage, **optimizer("Adagrad", lr=0.02)) for stage in range(4)},
    **{f"stage {stage}, Muon": tree(stage, {"reduce_scatter": stage == 1}, gradient_clipping=0.0, **MUON)
       for stage in range(4)},
    # schedules
    "stage 0, WarmupDecayLR": tree(0, **scheduler("WarmupDecayLR", total_num_steps=18, warmup_num_steps=5)),
    "stage 1, WarmupCosineLR": tree(1, **scheduler("WarmupCosineLR", total_num_steps=20, warmup_num_steps=4)),
    "stage 2, LRRangeTest": tree(2, **scheduler("LRRangeTest", lr_range_test_min_lr=1e-4, lr_range_test_step_size=3)),
    "stage 2, OneCycle with momentum": tree(2, **scheduler(
        "OneCycle", cycle_min_lr=1e-4, cycle_max_lr=4e-3, cycle_first_step_size=7, decay_lr_rate=0.01,
        cycle_min_mom=0.8, cycle_max_mom=0.95)),
    "stage 0, StepLR": tree(0, **scheduler("StepLR", step_size=5, gamma=0.5)),
    "stage 0, CosineAnnealingLR": tree(0, **scheduler("CosineAnnealingLR", T_max=20)),
    "stage 0, ExponentialLR": tree(0, **scheduler("ExponentialLR", gamma=0.9)),
    # precision
    **{f"stage {stage}, bf16": tree(stage, **BF16) for stage in (1, 3)},
    **{f"stage {stage}, bf16, fp32 accumulation": tree(stage, **BF16, data_types=FP32_SUMS, micro=1)
       for stage in (2, 3)},
    **{f"stage {stage}, bf16, optimizer on the CPU": tree(stage, {"offload_optimizer": OFFLOAD}, **BF16)
       for stage in (2, 3)},
    **{f"stage {stage}, bf16 masters": tree(stage, bf16=BF16_MASTERS, optimizer=EACH) for stage in (1, 2, 3)},
    "stage 2, bf16 without overflow check": tree(
        2, bf16={"enabled": True, "check_grad_overflow": False}, optimizer=EACH),
    "stage 1, bf16, gradients at once": tree(
        1, bf16={"enabled": True, "immediate_grad_update": True}, data_types=FP32_SUMS, optimizer=EACH),
    "stage 2, bf16 sent as fp32": tree(2, **BF16, communication_data_type="fp32"),
    **{f"stage {stage}, sent as bf16": tree(stage, communication_data_type="bf16", optimizer=EACH)
       for stage in range(4)},
    **{f"stage {stage}, autocast": tree(stage, torch_autocast=AUTOCAST, optimizer=EACH) for stage in range(4)},
    # recomputation, and what only reports
    "stage 1, recomputed by DeepSpeed": tree(1, activation_checkpointing={"partition_activations": True}),
    "stage 3, recomputed by DeepSpeed": tree(3, activation_checkpointing={"partition_activations": True}),
    "stage 2, profiled recomputation": tree(2, activation_checkpointing={"profile": True}),
    "stage 3, recomputed by torch": tree(3, activation_checkpointing={}),
    "stage 1, reports": tree(1, steps_per_print=5, wall_clock_breakdown=True, memory_breakdown=True, dump_state=True),
    "stage 2, no collector": tree(2, disable_python_gc=True, dataloader_drop_last=True),
}  # fmt: skip
"""Marked slow."""

ADAM = optimizer("Adam", lr=3e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1)
ON_CPU = {"offload_optimizer": OFFLOAD}
COMPILED: dict[str, dict[str, Any]] = {
    **{f"stage {stage}, Adam": tree(stage, **ADAM) for stage in (0, 2)},
    **{f"stage {stage}, Adam on the CPU": tree(stage, ON_CPU, **ADAM) for stage in (1, 2, 3)},
    "stage 2, Adam on the CPU, asked for": tree(2, ON_CPU, **ADAM, zero_force_ds_cpu_optimizer=True),
    "stage 3, half of Adam on the CPU": tree(3, {"offload_optimizer": {**OFFLOAD, "ratio": 0.5}}, **ADAM),
    "stage 3, bf16 masters on the CPU": tree(3, ON_CPU, **ADAM, bf16={**BF16_MASTERS, "bf16_optimizer_states": False}),
    "stage 2, Lion on the CPU": tree(2, ON_CPU, **optimizer("Lion", lr=3e-4, weight_decay=0.1)),
    "stage 1, Adagrad on the CPU": tree(1, ON_CPU, **optimizer("Adagrad", lr=0.02)),
}
"""What stock compiles with g++ at the first start."""

LONG_ON_TWO_RANKS = (
    "stage 1, predivided",
    "stage 0, predivided",
    "stage 1, sum",
    "stage 2, no reduce_scatter",
    "stage 3, no reduce_scatter",
    "stage 2, not contiguous",
    "stage 2, overlap_comm",
    "stage 3, overlap_comm",
    "stage 1, small buckets",
    "stage 2, round robin",
    "stage 3, persistent",
    "stage 3, small sub-groups",
    "stage 3, both on the CPU",
    "stage 3, all-reduce to fetch",
    "stage 2, sent as bf16",
    "stage 1, sent as bf16",
    "stage 3, bf16",
    "stage 1, bf16 masters",
    "stage 2, autocast",
    "stage 2, SGD",
    "stage 3, 4 micro-batches",
    "stage 3, recomputed by DeepSpeed",
    "stage 3, whole blocks",
    "stage 2, Muon",
    "stage 3, Adagrad",
)

TWO_RANKS = (
    "stage 0",
    "stage 1, clipping at 0.05",
    "stage 2, optimizer on the CPU",
    "stage 3, thresholds",
    "stage 2, bf16",
    "stage 1, WarmupLR",
)
"""Of SHORT, in `make test`."""

REPORTS = {
    "csv_monitor": {"enabled": True, "output_path": "csv", "job_name": "tiny"},
    "flops_profiler": {"enabled": True, "profile_step": 3, "detailed": True, "output_file": "flops.txt"},
    "comms_logger": {"enabled": True, "prof_all": True, "verbose": False},
    "tensorboard": {"enabled": TENSORBOARD, "output_path": "boards", "job_name": "tiny"},
}
WITH_REPORTS = {"reports": tree(2, **REPORTS, **scheduler("WarmupLR", warmup_max_lr=3e-3, warmup_num_steps=8))}


def other(stock: dict[str, Any], stage: int = 1, zero: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """A JSON, and top-level keys that the stock side has in place of its own."""
    return {"json": tree(stage, zero, **top), "stock": stock}


SHIPPED = json.loads((ROOT / "ds_configs" / "fp32_zero0.json").read_text())["optimizer"]
ADAPTED: dict[str, tuple[dict[str, Any], str]] = {
    "16 bit without ZeRO": (other({"zero_optimization": tree(1)["zero_optimization"]}, 0, **BF16), f"{ZERO}.stage"),
    "no optimizer": (
        other({"optimizer": {**SHIPPED, "params": {**SHIPPED["params"], "torch_adam": True}}}, optimizer=None),
        "optimizer",
    ),
    "clipping auto": (other({"gradient_clipping": 1.0}, gradient_clipping="auto"), ""),
    "offload at stage 0": (other({}, 0, {"offload_optimizer": OFFLOAD}), f"{ZERO}.offload_optimizer.device"),
    "a universal checkpoint": (other({}, checkpoint={"load_universal": True}), "checkpoint.load_universal"),
}
"""What runs as another JSON does under stock, which is given, and the key that the announcement names."""
DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    **{f"stage {stage}, Muon, clipped": (other({}, stage, **MUON), "optimizer.type") for stage in (0, 1)},
}
"""What stock trains otherwise, and the key that the announcement names."""
CONTROL = {
    "other clipping": other({"gradient_clipping": 0.0}),
    "other rate": other({"optimizer": {**ADAMW, "params": {**ADAMW["params"], "lr": 3.0001e-3}}}),
    "other decay": other({"optimizer": {**ADAMW, "params": {**ADAMW["params"], "weight_decay": 0.0999}}}),
}


@dataclass(frozen=True)
class Compared:
    """Settings trained on both sides."""

    folder: Path
    results: dict[str, dict[str, Any]]
    """Side -> setting -> what it wrote."""

    def beyond(self, names: Iterable[str]) -> dict[str, float]:
        """Those of `names` whose losses or weights differ by more than EXACT, and by how much."""
        differences = {name: self.difference(name) for name in names}
        return {name: one for name, one in differences.items() if one > EXACT}

    def difference(self, name: str) -> float:
        """The largest relative difference of a loss, and of a weight matrix by its norm."""
        ours, stock = (np.array(self.results[side][name]["losses"]) for side in ("ours", "stock"))
        assert np.isfinite(stock).all()
        assert stock[-1] < stock[0]
        worst = float(np.max(np.abs(ours - stock) / np.abs(stock)))
        files = [self.folder / side / f"{name}.npz" for side in ("ours", "stock")]
        with np.load(files[0]) as a, np.load(files[1]) as b:
            assert set(a) == set(b)
            return max(worst, *(float(np.linalg.norm(a[key] - b[key]) / np.linalg.norm(b[key])) for key in a))


def compare(settings: dict[str, dict[str, Any]], ranks: int, folder: Path, steps: int = STEPS) -> Compared:
    """Train settings on both sides, each side in processes of its own."""
    named, results = {name: one if "json" in one else {"json": one} for name, one in settings.items()}, {}
    (folder / "plan.json").write_text(json.dumps({"steps": steps, "settings": named}))
    for side in ("stock", "ours"):
        (folder / side).mkdir()
        program = ["-m", "tests.distributed.programs.stock", side, str(folder / "plan.json"), str(folder / side)]
        run_ranks(program, ranks, timeout=900)
        results[side] = json.loads((folder / side / "results.json").read_text())
    failed = [(side, name, one["error"]) for side in results for name, one in results[side].items() if "error" in one]
    assert failed == []
    assert {len(one["losses"]) for side in results.values() for one in side.values()} == {steps}
    return Compared(folder, results)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    announced = {name: setting for name, (setting, _) in {**ADAPTED, **DIFFERENT}.items()}
    return compare({**SHORT, **announced, **CONTROL, **WITH_REPORTS}, 1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    short = {name: SHORT[name] for name in TWO_RANKS}
    return compare({**short, **WITH_REPORTS}, 2, tmp_path_factory.mktemp("two"))


def test_short_list_equals_a_stock_loop(one_rank: Compared, two_ranks: Compared) -> None:
    assert one_rank.beyond(SHORT) == {}
    assert two_ranks.beyond(TWO_RANKS) == {}


@pytest.mark.parametrize("name", [*ADAPTED, *DIFFERENT])
def test_what_runs_otherwise_than_stock_is_announced(one_rank: Compared, name: str) -> None:
    key = {**ADAPTED, **DIFFERENT}[name][1]
    assert (one_rank.difference(name) > EXACT) == (name in DIFFERENT)
    said = [key for level, key in one_rank.results["ours"][name]["said"] if level == "adapted"]
    assert said == ([key] if key else [])


def test_control_another_rate_clipping_or_decay_is_found(one_rank: Compared) -> None:
    assert set(one_rank.beyond(CONTROL)) == set(CONTROL)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_long_list_equals_a_stock_loop(tmp_path: Path, ranks: int) -> None:
    names = LONG if ranks == 1 else LONG_ON_TWO_RANKS
    assert len(SHORT | LONG) >= 60
    assert len(LONG_ON_TWO_RANKS) >= 20
    compared = compare({name: LONG[name] for name in names}, ranks, tmp_path, LONG_STEPS)
    assert compared.beyond(names) == {}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles these optimizers with g++")
def test_optimizers_that_stock_compiles_equal_a_stock_loop(tmp_path: Path) -> None:
    assert compare(COMPILED, 1, tmp_path, LONG_STEPS).beyond(COMPILED) == {}


def written(folder: Path) -> dict[str, str]:
    """The reports under `folder`, without spaces and what the clock decides."""
    found = {}
    for file in sorted(folder.glob("csv/*/*.csv")):
        lines = file.read_text().splitlines()
        timer = "elapsed_time" in file.name
        found[file.name] = "\n".join(line.partition(",")[0] if timer else line for line in lines)
    clock = re.compile(
        r"[\d.]+ ?(?:[munp]?s|[KMGT]?FLOPS|samples/second)\b|[\d.]+% latency|.*latency.*'.*|samples/.*| +"
    )
    return {**found, "flops": clock.sub("", (folder / "flops.txt").read_text())}


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_side_effects_are_those_of_a_stock_loop(request: pytest.FixtureRequest, ranks: str) -> None:
    compared: Compared = request.getfixturevalue(ranks)
    ours, stock = (written(compared.folder / side) for side in ("ours", "stock"))
    assert ours == stock
    assert len(ours["Train_Samples_lr.csv"].splitlines()) == STEPS + 1
    assert "paramsperGPU" in ours["flops"]
    messages = [compared.results[side]["reports"]["messages"] for side in ("ours", "stock")]
    assert messages[0] == messages[1] != {}


@pytest.mark.skipif(not TENSORBOARD, reason="the package tensorboard is not installed")
def test_tensorboard_shows_the_scalars_of_a_stock_loop(one_rank: Compared) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore

    shown = []
    for side in ("ours", "stock"):
        board = EventAccumulator(str(one_rank.folder / side / "boards" / "tiny")).Reload()
        events = {tag: board.Scalars(tag) for tag in board.Tags()["scalars"]}
        shown.append(
            {tag: [(e.step, None if "elapsed" in tag else e.value) for e in all] for tag, all in events.items()}
        )
    assert shown[0] == shown[1]
    assert len(shown[0]["Train/Samples/lr"]) == STEPS
