"""Every guard of ours stands for a defect of stock DeepSpeed. Each test shows that the defect is still there, or says
which guard may go.

The keys of the configuration are compared with the installed DeepSpeed in tests/deepspeed_json/test_schema_contract.py.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import subprocess
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chatgot.deepspeed_json.machine import has_command
from chatgot.engine import guards, process_guards
from chatgot.engine.step import poisoned_by
from tests.support import environment, present, warm_python

pytestmark = pytest.mark.usefixtures("process_group")


def mended(what: str, guard: str) -> str:
    return f"DeepSpeed has mended it: {what}. Drop the guard: {guard}"


class Net(nn.Module):
    """Two matrices; the second one is AdamW's under Muon."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16, bias=False)
        self.lm_head = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.inner(x))).float().square().mean()


ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.1}}


def stock(stage: int = 0, groups: int = 1, **keys: Any) -> Any:
    """A DeepSpeedEngine as DeepSpeed makes it, without anything of ours."""
    import deepspeed

    torch.manual_seed(0)
    zero = {"stage": stage, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    config = {"train_batch_size": 1, "gradient_clipping": 0.0, "optimizer": ADAMW, "zero_optimization": zero, **keys}
    return deepspeed.initialize(
        model=(net := Net()),
        model_parameters=[{"params": [*net.parameters()][n::groups]} for n in range(groups)],  # type: ignore[arg-type]
        config=config,
        dist_init_required=False,
    )[0]


def train(engine: Any, steps: int = 1, scale: float = 1.0) -> None:
    dtype = next(engine.module.parameters()).dtype
    for _ in range(steps):
        engine.backward(engine(torch.ones(1, 16, dtype=dtype)) * scale)
        engine.step()


def parse(**keys: Any) -> Any:
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig({"train_batch_size": 1, **keys})


# --- configuration ---


def test_unknown_top_level_keys_are_accepted():
    try:
        config = parse(gradient_cliping=0.5, activation_checkpointing={"partition_activation": True})
    except Exception as error:  # noqa: BLE001 - whatever a DeepSpeed that refuses it may raise
        pytest.fail(
            mended(f"unknown keys are refused ({error})", "the strict schema, chatgot/deepspeed_json/schema.py")
        )
    assert config.gradient_clipping == 1.0, (
        "the default of gradient_clipping changed: ds_configs/ and the schema state it"
    )


def test_auto_means_off():
    config = parse(bf16={"enabled": "auto"})
    assert config.bfloat16_config.enabled is False, mended(
        '"auto" is no longer dropped', "_resolve_precision in config/deepspeed_json.py"
    )


def test_default_buckets_are_half_a_billion_elements():
    zero = parse(zero_optimization={"stage": 1}).zero_config
    sizes = (zero.reduce_bucket_size, zero.allgather_bucket_size)
    assert sizes == (500_000_000,) * 2, mended(
        "buckets are sized to the model", "bucket sizes from n_params in config/deepspeed_json.py"
    )


def test_16_bit_at_stage_0_steps_before_training():
    engine = stock(0, bf16={"enabled": True})
    taken = {float(state["step"]) for state in engine.basic_optimizer.state.values()}
    engine.destroy()
    assert taken == {1.0}, mended(
        "no optimizer step before training", "the refusal of 16 bit at stage 0 in config/deepspeed_checks.py"
    )


def test_schedulers_start_at_rate_zero():
    from deepspeed.runtime.lr_schedules import WarmupLR

    optimizer = torch.optim.SGD(Net().parameters(), lr=1.0)
    schedule = WarmupLR(optimizer, warmup_max_lr=1.0, warmup_num_steps=4, warmup_type="linear")
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(2):
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:2] == [0.0, 0.0], mended(
        "the first two steps learn", "the remark on stock schedulers beside chatgot.schedule"
    )


# --- start and environment ---


def test_plain_python_needs_mpi4py():
    env = {
        name: value
        for name, value in environment().items()
        if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    }
    done = subprocess.run(
        [warm_python(), "-c", "import deepspeed; deepspeed.init_distributed('gloo')"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0, mended(
        "plain python starts a group of one", "the last branch of find_place, engine/environment.py"
    )
    assert "mpi4py" in done.stderr


def test_an_empty_op_table_skips_the_shared_memory_op():
    from deepspeed.comm import comm

    backend = importlib.import_module("deepspeed.comm.torch")
    assert comm.cdb.shm_comm_op is None, (
        "DeepSpeed compiled its shared-memory op although the table is empty: process_guards.skip_shared_memory_op"
    )
    source = inspect.getsource(backend.build_shm_op)
    assert "__compatible_ops__" in source, mended(
        "the op is no longer compiled at the start", "process_guards.skip_shared_memory_op"
    )


def test_collectives_warn_that_torch_renamed_them():
    from deepspeed.comm import comm

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        comm.all_gather_into_tensor(torch.empty(4), torch.ones(4))
        comm.reduce_scatter_tensor(torch.empty(4), torch.ones(4))
    named = [w for w in caught if issubclass(w.category, FutureWarning) and "c10d_logger" in w.filename]
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13):
        pytest.skip("torch renamed the collectives in 2.13")
    assert named, mended("the new names are used", "process_guards.quiet_renamed_collectives")


def test_bf16_optimizer_always_reports_memory(monkeypatch):
    from deepspeed.runtime import bf16_optimizer, utils

    calls: list[bool] = []
    monkeypatch.setattr(utils, "see_memory_usage", lambda message, force=False: calls.append(force))
    monkeypatch.setattr(bf16_optimizer, "see_memory_usage", utils.see_memory_usage)
    precision = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    stock(1, **precision).destroy()
    assert any(calls), mended("the BF16_Optimizer is quiet", "process_guards.quiet_memory_report")
    calls.clear()
    process_guards.quiet_memory_report({})
    stock(1, **precision).destroy()
    assert calls
    assert not any(calls)
    process_guards.quiet_memory_report({"memory_breakdown": True})
    stock(1, **precision).destroy()
    assert any(calls)


def test_zero_3_counts_numa_nodes_at_every_reduction(monkeypatch):
    from deepspeed.utils import numa

    counted: list[int] = []
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    monkeypatch.setattr(numa, "get_numa_cores", lambda: counted.append(1) or [])
    engine = stock(3)
    train(engine, steps=3)
    before = len(counted)
    process_guards.count_numa_nodes_once()
    train(engine, steps=3)
    engine.destroy()
    assert before >= 3, mended("it counts once", "process_guards.count_numa_nodes_once")
    assert len(counted) <= before + 1


def test_autocast_outlives_its_engine():
    stock(0, torch_autocast={"enabled": True, "dtype": "float16"}).destroy()
    engine = stock(1)
    scaled = engine.optimizer.torch_autocast_gradscaler is not None
    engine.destroy()
    process_guards.forget_autocast()
    assert scaled, mended("an engine's autocast ends with it", "process_guards.forget_autocast")
    engine = stock(1)
    assert engine.optimizer.torch_autocast_gradscaler is None
    engine.destroy()


# --- activation checkpointing ---


@pytest.fixture
def checkpointing() -> Iterator[Any]:
    """deepspeed.checkpointing, whose settings are global to the process."""
    import deepspeed

    yield deepspeed.checkpointing
    deepspeed.checkpointing.configure(None, deepspeed_config={"train_batch_size": 1, "activation_checkpointing": {}})


def test_activation_checkpointing_section_does_nothing_by_itself():
    engine = stock(0, activation_checkpointing={"partition_activations": True})
    forwards = []
    engine.module.inner.register_forward_hook(lambda *_: forwards.append(1))
    train(engine)
    engine.destroy()
    assert len(forwards) == 1, mended("the section recomputes", "build.wire_activation_checkpointing")


def test_partition_activations_empties_float_arguments(checkpointing):
    section = {"train_batch_size": 1, "activation_checkpointing": {"partition_activations": True}}
    checkpointing.configure(None, deepspeed_config=section)
    x, table = torch.ones(4, 4, requires_grad=True), torch.ones(4, 4)
    checkpointing.checkpoint(lambda a, b: a * b, x, table)
    intact = table.numel() == 16 and table.untyped_storage().nbytes() == 64
    assert not intact, mended("arguments stay whole", "RoPE tables closed over in model/gpt.py, GPT.forward")


def test_cpu_checkpointing_fails_on_a_cpu(checkpointing):
    section = {"train_batch_size": 1, "activation_checkpointing": {"cpu_checkpointing": True}}
    checkpointing.configure(None, deepspeed_config=section)
    weight = torch.ones(4, 4, requires_grad=True)
    x = torch.ones(4, 4, requires_grad=True)
    try:
        checkpointing.checkpoint(lambda h: h @ weight, x * 2).sum().backward()
    except RuntimeError:
        return
    pytest.fail(
        mended(
            "cpu_checkpointing works on a CPU",
            "activation_checkpointing.cpu_checkpointing in CUDA_ONLY, deepspeed_schema.py",
        )
    )


def test_recomputation_forgets_autocast(checkpointing):
    seen = []

    def block(h: Tensor) -> Tensor:
        out = h @ weight
        seen.append(out.dtype)
        return out.float()

    checkpointing.configure(None, deepspeed_config={"train_batch_size": 1, "activation_checkpointing": {}})
    weight, x = torch.ones(4, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = checkpointing.checkpoint(block, x).sum()
    loss.backward()
    assert seen[0] == torch.bfloat16
    assert seen[1] == torch.float32, mended(
        "autocast is restored", "the refusal of backend deepspeed under torch_autocast"
    )


# --- gradients ---


@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_fp32_stage_0_has_no_norm_and_applies_nan(clipping):
    engine = stock(0, gradient_clipping=clipping)
    train(engine)
    assert engine.get_global_grad_norm() is None, mended("stage 0 keeps its norm", "guards.Stage0Gradients (the norm)")
    train(engine, scale=math.nan)
    lost = bool(torch.isnan(engine.module.inner.weight).all())
    skipped = engine.skipped_steps
    engine.destroy()
    assert lost, mended("stage 0 skips non-finite gradients", "guards.Stage0Gradients")
    assert skipped == 0


def test_one_rank_reduces_its_gradients_with_itself(monkeypatch):
    from deepspeed import comm

    reduced, engine = [], stock(0)
    theirs = comm.all_reduce
    monkeypatch.setattr(comm, "all_reduce", lambda *args, **kwargs: reduced.append(1) or theirs(*args, **kwargs))
    train(engine)
    engine.destroy()
    assert reduced, mended("a rank that is alone reduces nothing", "enable_backward_allreduce in Stage0Gradients")


def test_zero_grad_drops_the_gradients_of_all_parameters_one_by_one():
    from deepspeed.runtime.engine import DeepSpeedEngine

    source = inspect.getsource(DeepSpeedEngine.zero_grad)
    assert "self.module.named_parameters()" in source, mended("it is quick", "guards.Stage0Gradients.zero_grad")
    assert "param.grad = None" in source


@pytest.mark.parametrize("keys", [{}, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}])
def test_gradients_of_a_skipped_step_are_dropped_before_it_returns(keys):
    from deepspeed.utils import safe_get_full_grad

    engine = stock(1, **keys)
    train(engine, scale=math.inf)
    assert engine.skipped_steps == 1
    try:
        kept = safe_get_full_grad(engine.module.inner.weight)
    except ValueError:  # "Gradients are only available immediately after backward and before engine step"
        kept = None
    assert kept is None or bool(torch.isfinite(kept).all()), mended("they can be looked at", "guards.tell_overflow")
    seen: list[bool] = []
    guards.tell_overflow(
        engine.optimizer,
        lambda: seen.append(bool(torch.isfinite(present(safe_get_full_grad(engine.module.inner.weight))).all())),
    )
    train(engine)
    assert seen == []
    train(engine, scale=math.inf)
    engine.destroy()
    assert seen[0] is False  # the BF16_Optimizer drops them twice


@pytest.mark.parametrize("stage", [1, 2])
def test_offload_in_16_bit_never_trains_again_after_a_skipped_step(stage):
    offload = {"stage": stage, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
    keys = {"bf16": {"enabled": True, "check_grad_overflow": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine = stock(zero_optimization=offload, zero_force_ds_cpu_optimizer=False, **keys)
    train(engine, scale=math.inf)
    train(engine, steps=3)
    assert engine.skipped_steps == 4, mended(
        "gradients of a skipped step stay in the buffer", "guards.forget_skipped_gradients"
    )
    guards.forget_skipped_gradients(engine.optimizer)
    train(engine, scale=math.inf)
    train(engine, steps=3)
    assert engine.skipped_steps == 5


@pytest.mark.skipif(not has_command("g++", "c++"), reason="DeepSpeed compiles its CPUAdam")
def test_zero_3_steps_what_it_does_not_offload_at_a_constant_rate_and_saves_no_state_of_it():
    offload = {"device": "cpu", "ratio": 0.5, "pin_memory": False}
    adamw = {"type": "AdamW", "params": {"lr": 1e-2}}
    engine = stock(optimizer=adamw, zero_optimization={"stage": 3, "offload_optimizer": offload, "sub_group_size": 200})
    zero = engine.optimizer
    zero.subgroup_to_device[0] = "cpu:0"  # as on a GPU, where this is another device
    zero.param_groups[0]["lr"] = 0.0
    before = [flat.clone() for flat in zero.fp32_partitioned_groups_flat]
    train(engine)
    moved = [not torch.equal(a, b) for a, b in zip(before, zero.fp32_partitioned_groups_flat)]
    states = len(zero.state_dict()["optimizer_state_dict"]["state"])
    engine.destroy()
    assert (moved, states) == ([True, False], 1), mended("backup_optimizer", "guards.unite_the_two_adams")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_fails_on_two_groups_of_adagrad(stage):
    adagrad = {"type": "Adagrad", "params": {"lr": 1e-2}}
    with pytest.raises(IndexError):
        train(stock(stage, optimizer=adagrad, groups=2))
    engine = stock(stage, optimizer=adagrad)
    remade = engine.basic_optimizer is not engine.optimizer.optimizer
    assert remade, mended("Adagrad is made once", "guards.adopt_new_adagrad")
    engine.destroy()


@pytest.mark.skipif(not has_command("g++", "c++"), reason="DeepSpeed compiles its CPUAdam")
def test_moments_become_16_bit_when_they_are_loaded_for_16_bit_master_weights(tmp_path: Path):
    masters = {"enabled": True, "bf16_master_weights_and_grads": True}
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
    kinds = []
    for _ in range(2):
        engine = stock(optimizer={"type": "AdamW", "params": {"lr": 1e-2}}, zero_optimization=zero, bf16=masters)
        if kinds:
            engine.load_checkpoint(str(tmp_path))
        else:
            train(engine)
            engine.save_checkpoint(str(tmp_path))
        kinds += [state["exp_avg"].dtype for state in engine.basic_optimizer.state.values()]
        engine.destroy()
    assert kinds == [torch.float32, torch.bfloat16], mended(
        "moments are loaded as saved", "guards.keep_moments_in_fp32"
    )


def test_what_elastic_checkpoint_saves_cannot_be_loaded(tmp_path: Path):
    zero = {"stage": 1, "elastic_checkpoint": True}
    engine = stock(zero_optimization=zero)
    train(engine)
    engine.save_checkpoint(str(tmp_path))
    engine.destroy()
    engine = stock(zero_optimization=zero)
    with pytest.raises(AssertionError):
        engine.load_checkpoint(str(tmp_path))
    engine.destroy()


def test_max_grad_norm_is_no_argument_of_an_optimizer():
    with pytest.raises(ValueError, match="gradient_clipping"):
        stock(1, optimizer={"type": "AdamW", "params": {"lr": 1e-2, "max_grad_norm": 1.0}})


@pytest.mark.parametrize("stage", [1, 3])
def test_a_loss_that_is_not_finite_is_trained_on_if_its_gradients_are(stage):
    engine = stock(stage)
    engine.backward(engine(torch.ones(1, 16)) + math.nan)
    engine.step()
    assert engine.skipped_steps == 0, mended("it looks at the loss", "step.poisoned_by")
    engine.backward(poisoned_by(engine(torch.ones(1, 16)) + math.nan))
    engine.step()
    assert engine.skipped_steps == 1


def most_on_the_device(build: Callable[[], object]) -> int:
    """Elements of whole parameters that the device holds at once until ZeRO-3 has shared out a Net.

    On a CPU moving there copies nothing, but it is asked for all the same.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    to, share_out, held, most, left = Tensor.to, Init._zero_init_param, 0, 0, 2 * 16 * 16

    def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal held, most
        if left and (isinstance(place := next(iter(args), None), torch.device) or place == "cpu"):
            held += tensor.numel()
            most = max(most, held)
        return to(tensor, *args, **kwargs)

    def shared_out(init: Any, parameter: Any) -> None:
        nonlocal held, left
        share_out(init, parameter)
        held, left = held - parameter.ds_numel, left - parameter.ds_numel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "to", moved)
        patch.setattr(Init, "_zero_init_param", shared_out)
        build()
    return most


@pytest.mark.parametrize("keys", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_zero_3_takes_the_whole_model_to_the_device_before_it_is_shared_out(keys: dict[str, Any]):
    matrix = 16 * 16
    whole = most_on_the_device(lambda: stock(3, **keys))
    assert whole >= 2 * matrix, mended("the whole model on the device", "guards.sharing_out_from_the_cpu")

    def guarded() -> None:
        torch.manual_seed(0)
        with guards.sharing_out_from_the_cpu(net := Net()):
            import deepspeed

            zero = {"stage": 3, "reduce_bucket_size": 1000}
            config = {"train_batch_size": 1, "optimizer": ADAMW, "zero_optimization": zero, **keys}
            own: Any = list(net.parameters())
            deepspeed.initialize(model=net, model_parameters=own, config=config, dist_init_required=False)
        assert "to" not in vars(net)

    assert most_on_the_device(guarded) == matrix


def test_muons_update_is_clipped_under_zero():
    process_guards.run_muon_uncompiled()
    muon = {"type": "Muon", "params": {"lr": 0.02, "torch_adam": True, "momentum": 0.95}}

    def moved(clipping: float) -> float:
        engine = stock(1, optimizer=muon, gradient_clipping=clipping)
        before = engine.module.inner.weight.detach().clone()
        train(engine, scale=1e3)  # AdamW's gradients are large, and so is the common norm
        distance = float((engine.module.inner.weight.detach() - before).norm())
        engine.destroy()
        return distance

    free = moved(0.0)
    assert free > 0
    assert moved(1.0) < 0.2 * free, mended("Muon's update is not clipped", "guards.ClipAdamGroupsOnly")


def test_muon_is_compiled_at_import():
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    process_guards.run_muon_uncompiled()
    source = inspect.getsource(original_muon)
    decorated = [
        name
        for name in ("muon_update", "zeropower_via_gram_newtonschulz")
        if f"@compiler.compile()\ndef {name}(" in source
    ]
    assert len(decorated) == 2, mended("Muon is not compiled at import", "process_guards.run_muon_uncompiled")
    assert hasattr(torch.compile(lambda x: x), "_torchdynamo_orig_callable"), (
        "torch keeps the eager function elsewhere now"
    )
    for function in (*(getattr(original_muon, name) for name in decorated), muon_optimizer.muon_update):
        assert not hasattr(function, "_torchdynamo_orig_callable"), f"{function} is compiled in spite of the guard"


# --- checkpoints ---


def test_latest_is_written_before_the_other_ranks_are_done():
    from deepspeed.runtime.engine import DeepSpeedEngine

    source = inspect.getsource(DeepSpeedEngine.save_checkpoint)
    own_part, latest = source.index("self._save_zero_checkpoint("), source.index("os.path.join(save_dir, 'latest')")
    assert own_part < latest
    between = source[own_part:latest]
    assert "barrier()" not in between, mended(
        "a barrier comes before `latest`", "save_latest=False and our own pointer, checkpoint/save.py"
    )


def test_a_save_ends_in_a_barrier_which_a_rank_that_cannot_write_never_reaches(tmp_path: Path):
    from deepspeed.runtime.engine import DeepSpeedEngine

    source = inspect.getsource(DeepSpeedEngine.save_checkpoint)
    after = source[source.index("self._save_zero_checkpoint(") :]
    assert "dist.barrier()" in after, mended("the ranks do not wait for each other", "guards.file_operations")
    engine, tried = stock(1), []

    def fails(name: str, theirs: Any) -> Any:
        return lambda *args, **kwargs: tried.append(name)

    with guards.file_operations(engine, fails):
        engine.save_checkpoint(str(tmp_path / "a"), tag="a", save_latest=False)
    assert set(tried) == {"makedirs", "save", "_copy_recovery_script"}
    assert not list(tmp_path.rglob("*.pt"))
    engine.save_checkpoint(str(tmp_path / "b"), tag="b")
    engine.destroy()
    assert len(list((tmp_path / "b").rglob("*.pt"))) == 2


def test_loading_from_an_empty_folder_returns_nothing(tmp_path: Path):
    engine = stock()
    found = engine.load_checkpoint(str(tmp_path))
    engine.destroy()
    assert found == (None, None), mended("it is an error", "the check of `path is None` in checkpoint/load.py")


def test_client_state_overwrites_the_engine(tmp_path: Path):
    engine = stock()
    train(engine)
    engine.save_checkpoint(str(tmp_path), tag="a", client_state={"global_steps": 12345})
    engine.load_checkpoint(str(tmp_path), tag="a")
    steps = engine.global_steps
    engine.destroy()
    assert steps == 12345, mended("client_state has its own place", 'the single key "chatgot" of checkpoint/save.py')


def test_resume_takes_hyper_parameters_from_the_checkpoint(tmp_path: Path):
    engine = stock(1, gradient_clipping=0.25)
    train(engine)
    engine.save_checkpoint(str(tmp_path), tag="a")
    engine.destroy()
    other = copy.deepcopy(ADAMW)
    other["params"].update(weight_decay=0.5, betas=[0.8, 0.9])
    engine = stock(1, gradient_clipping=0.75, optimizer=other)
    assert engine.optimizer.param_groups[0]["weight_decay"] == 0.5
    engine.load_checkpoint(str(tmp_path), tag="a")
    group, clipping = engine.optimizer.param_groups[0], engine.optimizer.clip_grad
    engine.destroy()
    assert group["weight_decay"] == 0.1, mended(
        "the JSON's weight decay holds", "load in checkpoint/resume.py (groups)"
    )
    assert tuple(group["betas"]) == (0.9, 0.999), mended(
        "the JSON's betas hold", "load in checkpoint/resume.py (groups)"
    )
    assert clipping == 0.25, mended("the JSON's clipping holds", "load in checkpoint/resume.py (clip_grad)")


def test_zero_to_fp32_cannot_read_the_bf16_optimizer(tmp_path: Path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine = stock(1, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"})
    assert type(engine.optimizer).__name__ == "BF16_Optimizer"
    train(engine)
    engine.save_checkpoint(str(tmp_path), tag="a")
    engine.destroy()
    try:
        get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag="a")
    except (KeyError, ValueError):
        return
    pytest.fail(mended("zero_to_fp32 reads it", "nothing in ours: checkpoint/portable.py reads every stage's files"))


def test_groups_that_deepspeed_makes_have_torchs_timeout(monkeypatch):
    import torch.distributed as dist
    from deepspeed.comm import comm
    from deepspeed.comm.torch import TorchBackend

    def timeout_of_a_new_group() -> timedelta:
        group: Any = comm.new_group([0])
        return group._get_backend(torch.device("cpu")).options._timeout

    monkeypatch.setattr(TorchBackend, "new_group", lambda self, ranks: dist.new_group(ranks))  # DeepSpeed's own
    given = inspect.getsource(importlib.import_module("deepspeed.comm.torch")).count(
        "torch.distributed.new_group(ranks)"
    )
    assert given == 1, mended("new_group takes a timeout", "process_guards.time_out_alike")
    assert timeout_of_a_new_group() == timedelta(minutes=30)
    process_guards.time_out_alike(timedelta(seconds=77))
    assert timeout_of_a_new_group() == timedelta(seconds=77)
