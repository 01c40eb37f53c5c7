"""Undoing a part of a step inside a living DeepSpeedEngine: what a broken forward or backward left, partial gradients,
the batch's numbers.

All of it is DeepSpeed 0.19.8's inner state; tests/distributed/test_out_of_memory.py pins it at every stage.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Before:
    """What `repair` needs to know of the moment before a forward pass."""

    available: frozenset[int]
    """ZeRO-3: ids of the parameters that are whole on this rank (small ones stay so)."""
    module_stack: int
    """ZeRO-3: depth of its stack of modules."""


def before(engine: Any) -> Before:
    """Call before the forward pass of a micro-batch."""
    if engine.zero_optimization_stage() < 3:
        return Before(frozenset(), 0)
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    available = (p.ds_id for p in engine.module.parameters() if p.ds_status == ZeroParamStatus.AVAILABLE)
    return Before(frozenset(available), len(parameter_offload.FWD_MODULE_STACK))


def repair(engine: Any, then: Before) -> None:
    """After an exception in forward or backward: bring this rank's engine to where it stood before that micro-batch
    began.

    No collective. Gradients of the micro-batch are lost, and so are those before it: the step has to be discarded.
    """
    optimizer = engine.optimizer
    for parameter in engine.module.parameters():
        parameter.grad = None
    for timer in engine.timers.get_timers().values() if hasattr(engine.timers, "get_timers") else ():
        timer.started_ = False
    state = getattr(optimizer, "_backward_hook_state", None)
    if state is not None:
        state.backward_active_depth = state.remaining_grad_acc_hooks = 0
        state.reset_for_new_step()
    _clear_buckets(optimizer)
    if engine.zero_optimization_stage() == 3:
        _close_modules(engine, then)
    forget_checkpointed_activations()
    free_memory()


def _clear_buckets(optimizer: Any) -> None:
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        (
            getattr(bucket, "clear_params", None) or bucket.clear
        )()  # ZeRO-3 keeps its buffer, ZeRO 1 and 2 take a new one
    reduced = getattr(optimizer, "params_already_reduced", None)
    if reduced is not None:
        for index in reduced if isinstance(reduced, dict) else range(len(reduced)):
            reduced[index] = False
    if hasattr(optimizer, "extra_large_param_to_reduce"):
        optimizer.extra_large_param_to_reduce.clear()
    if isinstance(getattr(optimizer, "previous_reduced_grads", None), dict):
        optimizer.previous_reduced_grads.clear()
    if hasattr(optimizer, "_release_ipg_buffers"):
        optimizer._release_ipg_buffers()


def _close_modules(engine: Any, then: Before) -> None:
    """ZeRO-3: leave the modules that were open, and give back the parameters that were gathered for them."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    coordinator = engine.optimizer._get_param_coordinator()
    del parameter_offload.FWD_MODULE_STACK[then.module_stack :]
    coordinator._PartitionedParameterCoordinator__active_backward_submodules.clear()
    for module in engine.module.modules():
        module.ds_grads_remaining = module.applied_pre_backward_ref_cnt = 0
        module.ds_recompute_parameters.clear()
    for parameter in engine.module.parameters():
        parameter.ds_active_sub_modules.clear()
    coordinator._clean_inflight_param_registry()
    for parameter in engine.module.parameters():
        if parameter.ds_status == ZeroParamStatus.AVAILABLE and parameter.ds_id not in then.available:
            parameter.partition()
    if coordinator.is_record_trace():
        # the trace was cut short: the tiny batch records it anew, as the other ranks did
        coordinator._invalidate_trace()


def discard(engine: Any) -> None:
    """Drop all gradients of the step that is under way, on every rank, after its last backward and in place of
    engine.step().

    Weights, optimizer, step counters and loss scale stay. Afterwards the engine expects the first micro-batch of a
    step.
    """
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    engine.zero_grad()
    if hasattr(optimizer, "clear_hp_grads"):  # the BF16_Optimizer
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()
    elif stage > 0:
        _clear_buckets(optimizer)
        _drop_partitions(optimizer, stage)
    engine.micro_steps = 0
    forget_checkpointed_activations()
    free_memory()


def _drop_partitions(optimizer: Any, stage: int) -> None:
    optimizer.zero_grad(set_to_none=True)
    offload = bool(optimizer.offload_optimizer if stage == 3 else optimizer.cpu_offload)
    if offload:
        optimizer.reset_cpu_buffers()
    if stage == 3:
        optimizer.micro_step_id = 0  # the next backward overwrites the gradient partitions
        optimizer._epilogue_ran_this_backward = False
        optimizer._offload_boundary_param_ids = set()
        if not offload:
            optimizer.averaged_gradients = {}
        # small parameters that stay whole: a rank that left collectives out holds rubbish
        optimizer.empty_partition_cache()
        return
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

    optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
    optimizer._epilogue_ran_this_backward = False
    if offload:
        optimizer._offload_accumulated_param_ids = set()
        return
    optimizer._release_preflattened_grad_buffers()
    for index in set(optimizer.averaged_gradients) | set(optimizer.all_grad_tensors):
        optimizer.averaged_gradients[index] = None
        optimizer.all_grad_tensors[index] = None


def resize(engine: Any, micro_batch: int, accumulation: int) -> None:
    """Another micro-batch and accumulation for the same global batch, between two steps.

    DeepSpeed's set_train_micro_batch_size and set_train_batch_size change its config only; its optimizers keep the
    accumulation, and the boundary is counted in micro steps since the start of the process.
    """
    total = engine.train_batch_size()
    engine.set_train_micro_batch_size(micro_batch)
    engine.set_train_batch_size(total)
    if engine.gradient_accumulation_steps() != accumulation:
        raise ValueError(f"micro-batch {micro_batch} and accumulation {accumulation} do not make {total}")
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = accumulation
    engine.micro_steps = 0
    forget_checkpointed_activations()


def forget_checkpointed_activations() -> None:
    """contiguous_memory_optimization keeps buffers for one micro-batch size, and a forward without its backward leaves
    them full.
    """
    import deepspeed

    deepspeed.checkpointing.reset()


def free_memory() -> None:
    """Give back what nobody holds: Python's garbage, and the blocks that CUDA's allocator keeps."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
