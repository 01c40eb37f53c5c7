"""Every patch of DeepSpeed 0.19.8 and torch that is made to an engine; tests/engine/test_deepspeed_contracts.py shows
the defect behind each.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.errors import ConfigError

# --- gradients of an engine ---


def install(engine: Any, muon: bool, on_overflow: Callable[[], None]) -> Stage0Gradients | None:
    """Put the guards on a new engine; returns the one that the step must call, where there is one.

    Args:
        on_overflow: called on all ranks in a step that is skipped, while its gradients still exist.
    """
    if not engine.zero_optimization():
        return Stage0Gradients(engine, muon, on_overflow)
    tell_overflow(engine.optimizer, on_overflow)
    # The BF16_Optimizer (bf16, stage 1, fp32 accumulation) clips raw gradients before Muon, which is right.
    if muon and hasattr(engine.optimizer, "unscale_and_clip_grads"):
        ClipAdamGroupsOnly(engine.optimizer)
    if hasattr(engine.optimizer, "backup_optimizer"):
        unite_the_two_adams(engine.optimizer)
    if getattr(engine.basic_optimizer, "fp32_optimizer_states", False):
        keep_moments_in_fp32(engine.basic_optimizer)
    if engine.zero_optimization_stage() < 3 and getattr(engine.optimizer, "cpu_offload", False):
        forget_skipped_gradients(engine.optimizer)
    return None


def refuse_overwritten_gradients(config: EngineConfig, device: torch.device) -> None:
    """Refuse CUDA graphs where gradients wait for the next micro-batch in the graph's memory, which that overwrites.

    ZeRO 2 and 3 copy them out after each micro-batch.

    Raises:
        ConfigError: chatgot.compile.mode makes graphs, and gradients are accumulated at stage 0 or 1.
    """
    compile, accumulation = config.chatgot.compile, config.accumulation
    graphs = compile.enabled and compile.mode != "default" and device.type == "cuda"
    if graphs and accumulation > 1 and config.zero_stage < 2:
        raise ConfigError(
            f"{config.path}: chatgot.compile.mode = {compile.mode!r}: its CUDA graphs overwrite gradients that wait for"
            f' the next micro-batch (accumulation {accumulation} at ZeRO stage {config.zero_stage}); use "default", '
            "ZeRO stage 2, or a micro-batch that needs no accumulation"
        )


class Stage0Gradients:
    """Measures and clips the gradients of an fp32 engine without ZeRO, and refuses non-finite ones.

    DeepSpeed clips there but throws the norm away, measures nothing when clipping is off, and applies NaN to the
    weights (engine.py, _take_model_step); every ZeRO stage skips such a step. After `before_step` they all behave
    alike: `engine.get_global_grad_norm()` answers, and a bad step is skipped and counted in `engine.skipped_steps`.
    """

    def __init__(self, engine: Any, muon: bool, on_overflow: Callable[[], None]) -> None:
        self.engine = engine
        self.max_norm = float(engine.gradient_clipping())
        self.on_overflow = on_overflow
        self.trained = [p for p in engine.module.parameters() if p.requires_grad]
        # Muon's updates have a fixed size; see ClipAdamGroupsOnly, which does the same under ZeRO.
        self.clipped = [p for p in self.trained if not getattr(p, "use_muon", False)] if muon else self.trained
        self._step = engine.optimizer.step
        engine.clip_fp32_gradients, engine.zero_grad, engine.optimizer.step = self.clip, self.zero_grad, self.step
        engine.optimizer.overflow = False
        # DeepSpeed flattens, reduces and copies back every gradient even where there is nobody to share it with.
        # It rounds them to communication_data_type on the way.
        if dist.get_world_size() == 1 and engine.communication_data_type == torch.float32:
            engine.enable_backward_allreduce = False

    def before_step(self) -> None:
        """Call once per step, between the last backward, when gradients are averaged over ranks, and engine.step()."""
        if self.max_norm > 0:
            return  # DeepSpeed unscales the gradients (torch_autocast with fp16) and then calls clip_fp32_gradients
        scaler = self.engine.torch_autocast_z0_gradscaler
        if scaler is not None:
            scaler.unscale_(self.engine.optimizer)
        self.clip()

    def clip(self) -> None:
        """In place of DeepSpeed's clip_fp32_gradients: clip, keep the norm, and say whether to skip the step."""
        norm = _norm(self.clipped)
        total = norm if self.clipped is self.trained else _norm(self.trained)
        finite = bool(torch.isfinite(total))
        if finite and self.max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.clipped, self.max_norm, norm)
        elif not finite:
            self.on_overflow()
        self.engine._global_grad_norm = float(norm) if finite else math.inf
        # engine._take_model_step counts a skipped step where its optimizer says `overflow`.
        self.engine.optimizer.overflow = not finite

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer's step, unless gradients were not finite: without any, Muon would still apply its momentum."""
        return None if self.engine.optimizer.overflow else self._step(*args, **kwargs)

    def zero_grad(self) -> None:
        """The same as DeepSpeed's, which walks through all modules for it in every step."""
        for parameter in self.trained:
            parameter.grad = None


def _norm(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class ClipAdamGroupsOnly:
    """Lets Muon learn under ZeRO: clipping applies to the AdamW groups' gradients, by their own norm.

    ZeRO 1-3 orthogonalise Muon's gradients before they clip, so it is the update that gets clipped: with the default of
    1.0 the first step moves the weights by 5e-5 instead of 1.8e-3. An orthogonalised update has a fixed size and needs
    no clipping. Raw gradients of Muon's matrices no longer exist at that point, so `optim/grad_norm` is the AdamW
    groups' norm at every stage.
    """

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self.norms: dict[int, torch.Tensor] = {}
        self.stage3 = hasattr(zero, "sub_groups_using_muon")
        self._norm, self._clip = zero.get_grad_norm_direct, zero.unscale_and_clip_grads
        zero.get_grad_norm_direct, zero.unscale_and_clip_grads = self.norm, self.clip

    def norm(self, gradients: Any, params: Any, norm_type: int = 2) -> torch.Tensor:
        """DeepSpeed's norm of one group, remembered. `params` is the very list that the optimizer keeps for it."""
        norm = self._norm(gradients, params, norm_type)
        self.norms[id(params)] = norm
        return norm

    def adam_norm(self) -> torch.Tensor:
        """Norm over the AdamW groups of this step, still multiplied by the loss scale."""
        lists = self.zero.fp16_groups if self.stage3 else self.zero.params_in_partition
        norms = [self.norms[id(params)] for i, params in enumerate(lists) if not self.uses_muon(i)]
        return torch.linalg.vector_norm(torch.stack([torch.as_tensor(n, dtype=torch.float32) for n in norms]))

    def uses_muon(self, group: int) -> bool:
        """Whether the optimizer group (stage 1-2) or sub-group (stage 3) holds Muon's matrices."""
        if self.stage3:
            return bool(self.zero.sub_groups_using_muon[group])
        return bool(self.zero.optimizer.param_groups[group]["use_muon"])

    def clip(self, group: Any, total_norm: torch.Tensor) -> None:
        """In place of unscale_and_clip_grads: only unscale Muon groups, and clip AdamW groups by their own norm."""
        masters = () if self.stage3 else self.zero.single_partition_of_fp32_groups
        index = group if self.stage3 else next(i for i, flat in enumerate(masters) if flat.grad is group[0])
        norm = self.adam_norm()
        self.zero._global_grad_norm = norm / self.zero.loss_scale
        self._clip(group, torch.zeros_like(norm) if self.uses_muon(index) else norm)


def forget_skipped_gradients(zero: Any) -> None:
    """Lets a run with optimizer offload at stage 1-2 and fp32 accumulation in 16 bit outlive a skipped step.

    DeepSpeed keeps the flat gradient buffer of such a step (stage_1_and_2.py, step: only the branch without offload
    drops averaged_gradients), and the next backward adds to its NaN: every later step is skipped too. In a good step
    they are dropped already.
    """
    reset = zero.reset_cpu_buffers

    def reset_cpu_buffers() -> None:
        reset()
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = None

    zero.reset_cpu_buffers = reset_cpu_buffers


def unite_the_two_adams(zero: Any) -> None:
    """Lets what ZeRO-3 keeps on the device with offload_optimizer.ratio below 1 follow schedules and be saved.

    DeepSpeed steps it with a second optimizer (stage3.py, _optimizer_step), whose first group keeps its first learning
    rate, and whose state it never saves. Here the second one steps with the groups and the state of the first one.
    """
    step, second = zero._optimizer_step, zero.backup_optimizer

    def step_alike(sub_group_id: int) -> None:
        second.param_groups, second.state = zero.optimizer.param_groups, zero.optimizer.state
        for group in second.param_groups:
            group.update({key: value for key, value in second.defaults.items() if key not in group})
        step(sub_group_id)

    zero._optimizer_step = step_alike


def adopt_new_adagrad(engine: Any) -> None:
    """Lets a run with Adagrad under ZeRO be looked at and resumed: ZeRO replaces torch's Adagrad by a new one
    (initialize_optimizer_states), of which the engine does not know, and whose parameters stage 3 would load twice.
    """
    engine.basic_optimizer = engine.optimizer.optimizer
    if engine.zero_optimization_stage() == 3:
        engine.optimizer._clear_fp32_optimizer_param_groups()


def keep_moments_in_fp32(optimizer: Any) -> None:
    """Lets a run with 16-bit master weights and CPUAdam's fp32 moments resume as the same run: torch rounds a loaded
    moment to the dtype of its parameter (Optimizer.load_state_dict).
    """
    theirs = optimizer.load_state_dict

    def load_state_dict(saved: dict[str, Any]) -> None:
        theirs(saved)
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters):
            state, moments = optimizer.state[parameter], saved["state"].get(number, {})
            rounded = [key for key in state.keys() & moments.keys() if key.startswith("exp_avg")]
            state.update({key: moments[key] for key in rounded if state[key].dtype != moments[key].dtype})

    optimizer.load_state_dict = load_state_dict


def tell_overflow(optimizer: Any, call: Callable[[], None]) -> None:
    """Call `call` in a step that ZeRO skips, before it drops the gradients, which nobody could look at afterwards.

    ZeRO 1-3 call _update_scale(overflow) between the check and the dropping (stage_1_and_2.py and stage3.py, step), the
    BF16_Optimizer clear_hp_grads, twice (bf16_optimizer.py, step). All ranks agree on the overflow by then.
    """
    name = "_update_scale" if hasattr(optimizer, "_update_scale") else "clear_hp_grads"
    theirs = getattr(optimizer, name)

    def ours(*args: Any, **kwargs: Any) -> None:
        if args[0] if name == "_update_scale" else optimizer.overflow:
            call()
        theirs(*args, **kwargs)

    setattr(optimizer, name, ours)


# --- checkpoints ---


@contextlib.contextmanager
def sharing_out_from_the_cpu(model: nn.Module) -> Iterator[None]:
    """Within it ZeRO-3 takes a model to the device parameter by parameter, and shares each out before the next.

    DeepSpeed takes the whole model there first, and broadcasts it (engine.py, _configure_distributed_model), so that a
    model would have to fit into every device for the moment; what shares it out then does both for each parameter
    (partition_parameters.py, Init._zero_init_param).
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    broadcast = DeepSpeedEngine._broadcast_model
    DeepSpeedEngine._broadcast_model = lambda self: None
    model.__dict__["to"] = lambda place: model
    try:
        yield
    finally:
        del model.__dict__["to"]
        DeepSpeedEngine._broadcast_model = broadcast


@contextlib.contextmanager
def file_operations(engine: Any, replace: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within it a save's file operations on this rank are `replace(name, theirs)`; names: save, makedirs,
    _copy_recovery_script, and copytree, which DeepSpeed imports when it copies what it offloads to NVMe.

    DeepSpeed meets the other ranks in a barrier after it has written (engine.py, save_checkpoint): a rank whose disk is
    full would raise before it, and leave them waiting until the process group's timeout.
    """
    files = engine.checkpoint_engine
    patched = [(files, "save"), (files, "makedirs"), (engine, "_copy_recovery_script")]
    copytree = shutil.copytree
    for owner, name in patched:
        setattr(owner, name, replace(name, getattr(owner, name)))
    shutil.copytree = replace("copytree", copytree)
    try:
        yield
    finally:
        shutil.copytree = copytree
        for owner, name in patched:
            delattr(owner, name)
