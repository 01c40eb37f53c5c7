"""The table of rules about a DeepSpeed JSON: what DeepSpeed refuses late, does wrongly or drops in silence (errors),
what is legal and yet wrong or unwise (warnings), and what is good to know (notes).

train.py, `chatgot check` and `check --explain` all take them from here. A row: keys, condition, message, source.
"""

from __future__ import annotations

from typing import Any

from chatgot.deepspeed_json import machine, optimizers
from chatgot.deepspeed_json.findings import ABSENT
from chatgot.deepspeed_json.rule_types import (
    RECOMPUTATION_OF_DEEPSPEED,
    Rule,
    Subject,
    accepts,
    adapted,
    error,
    note,
    warning,
)
from chatgot.deepspeed_json.schema import BF16_NAMES, FP16_NAMES, FP32_NAMES, STAGES

CUDA_ONLY = (
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.offload_optimizer.super_offload",
    "aio.use_gds",
    "activation_checkpointing.cpu_checkpointing",
)
"""Flags that fail on the CPU accelerator."""
_WASTE_WORTH_A_WARNING = 64 * 2**20
"""Bytes of communication buffer beyond the model."""
_ACCUMULATION_THAT_ROUNDS = 4
_NAMES = {"bf16": BF16_NAMES, "fp16": FP16_NAMES, "fp32": FP32_NAMES}
_ZERO, _RECOMPUTATION = "zero_optimization", "activation_checkpointing"
_OFFLOADS = {
    f"{_ZERO}.offload_optimizer": f"{_ZERO}.cpu_offload",
    f"{_ZERO}.offload_param": f"{_ZERO}.cpu_offload_param",
}
_PARALLEL = "not supported by ChatGoT, whose model is data-parallel only (ZeRO shares out the memory)"
_GPT_DATA = "not supported by ChatGoT, which reads its own data"
_NO_EXPERTS = "not supported by ChatGoT, whose model has no experts"
_QUANTIZED = "not supported by ChatGoT: it quantizes weights for inference"
_ADAM_ON_CPU = f'{_ZERO}.offload_optimizer.device = "cpu" with an adam optimizer'
_UNSTATED = "is not stated: {now} since 2026, {before} before; state it, so that the file means the same everywhere"

_SCATTERED = "does not work with reduce_scatter at ZeRO stage {stage}; set zero_optimization.reduce_scatter = false"
_STAGES_2_3 = "zero/stage_1_and_2.py, zero/stage3.py"


def _scatters(s: Subject) -> dict[str, int] | None:
    return {"stage": s.stage} if s.stage in (2, 3) and s.v.zero_optimization.reduce_scatter else None


def _bucket(s: Subject, dotted: str) -> dict[str, str] | None:
    """DeepSpeed allocates reduce_bucket_size elements whatever the model's size."""
    bucket, n_params = s.v[dotted], s.n_params
    if n_params is None or dotted not in s.v or not isinstance(bucket, int) or s.stage not in STAGES[dotted]:
        return None
    if bucket <= n_params + n_params % 2:
        return None
    size, buffered = 4 if s.precision == "fp32" else 2, dotted == f"{_ZERO}.reduce_bucket_size"
    waste = f": a buffer of {bucket * size / 2**30:.2f} GiB is allocated, twice with overlap_comm" if buffered else ""
    warned = buffered and (bucket - n_params) * size > _WASTE_WORTH_A_WARNING
    return {"n_params": f"{n_params:,}", "waste": waste, "level": "warning" if warned else "note"}


def _is_alone(s: Subject) -> bool:
    """Whether stage 3 has no other rank and no other memory to share with."""
    zero = s.v.zero_optimization
    return s.ranks == 1 and not (s.offloaded or zero.offload_param.device != "none" or zero.cpu_offload_param)


def _refinement(s: Subject) -> Any:
    """The section chatgot.activation_checkpointing as given."""
    chatgot = s.tree.get("chatgot")
    return chatgot.get(_RECOMPUTATION) if isinstance(chatgot, dict) else None


def _supported(s: Subject) -> str:
    return " or ".join([*(name for name in ("bf16", "fp16") if getattr(s.facts, name)), "fp32 (neither section)"])


# fmt: off
RULES: tuple[Rule, ...] = (
    # What ChatGoT cannot honour: the key, why, and the values that pass.
    accepts("hybrid_engine.enabled", "not supported by ChatGoT, which does no RLHF", False),
    accepts("tensor_parallel.autotp_size", _PARALLEL, 0, 1),
    accepts("tensor_parallel.dtype", "DeepSpeed takes no text here, and ChatGoT does not use the section; delete it"),
    accepts("tensor_parallel.tensor_parallel.tp_size", _PARALLEL, 1),
    accepts("expert_parallel.enabled", _NO_EXPERTS, False, None),
    accepts("expert_parallel.load_balance_coeff", "DeepSpeed refuses every value but null; delete it", None),
    accepts("zero_optimization.zenflow",
            "not supported by ChatGoT: ZenFlow changes the number of accumulation steps by itself"),
    accepts("data_efficiency.data_sampling.enabled", _GPT_DATA, False, None),
    accepts("data_efficiency.data_sampling.curriculum_learning.enabled", _GPT_DATA, False, None),
    accepts("data_efficiency.data_sampling.dynamic_batching.enabled", _GPT_DATA, False, None),
    accepts("autotuning.enabled",
            "not supported by ChatGoT: autotuning restarts the program through DeepSpeed's own launcher", False, None),
    accepts("weight_quantization.enabled", _QUANTIZED, False),
    error("weight_quantization", lambda s, on: on and "weight_quantization.enabled" not in s.v
          and {"value": s.tree["weight_quantization"]}, _QUANTIZED),
    accepts("pipeline.stages", _PARALLEL, "auto", 1),
    accepts("sequence_parallel_size", _PARALLEL, 1),
    accepts("use_data_before_expert_parallelism", _NO_EXPERTS, False, None),
    accepts("managed_gradient_accumulation",
            "not supported by ChatGoT, whose loop leaves accumulation to DeepSpeed", True),
    accepts("checkpoint.writer",
            "not supported by ChatGoT: DeepSpeed cannot read back what these writers wrote under torch >= 2.6"),
    accepts("checkpoint.use_node_local_storage",
            "not supported by ChatGoT: a checkpoint is one folder that all ranks see", False, None),
    accepts("checkpoint.parallel_write.pipeline_stage", _PARALLEL, False),
    accepts("datastates_ckpt",
            "not supported by ChatGoT: checkpoints are published whole, by ChatGoT's own protocol; delete it"),
    accepts("zero_optimization.legacy_stage1", "DeepSpeed no longer has the old stage 1; delete it", False),
    accepts("compile.passes", 'supported by ChatGoT are ["z1"] and ["z3"]', None, ["z1"], ["z3"]),
    accepts("compile.autoep_non_moe", _NO_EXPERTS, False),
    error("allgather_size", lambda s, _: "allgather_size" in s.v and not isinstance(s.tree.get(_ZERO), bool),
          "DeepSpeed ignores it here; write zero_optimization.allgather_bucket_size"),

    # Precision.
    error("fp16.enabled", lambda s, on: on and s.v.bf16.enabled, "bf16.enabled is true too; enable one of them"),
    error("bf16.enabled", lambda s, on: on and not s.facts.bf16 and {"device": s.device, "supported": _supported(s)},
          "bf16 is not supported on this device ({device}); use {supported}", device=True),
    error("fp16.enabled", lambda s, on: on and not s.facts.fp16 and {"device": s.device, "supported": _supported(s)},
          "fp16 is not supported on this device ({device}); use {supported}", device=True),
    error("torch_autocast.enabled", lambda s, on: on and s.v.fp16.enabled,
          "fp16.enabled is true too; autocast keeps fp32 parameters, fp16 casts them: enable one of them"),
    warning("torch_autocast.enabled", lambda s, on: on and s.v.bf16.enabled,
            "bf16.enabled is true too: autocast then runs around parameters that are bf16 already, and saves little"),
    error("torch_autocast.dtype", lambda s, dtype: s.v.torch_autocast.enabled and dtype is None,
          'must be given when torch_autocast is enabled: "bfloat16" or "float16"', absent=True),
    *(error("torch_autocast.dtype", lambda s, dtype, name=name: s.v.torch_autocast.enabled and dtype in _NAMES[name]
            and not getattr(s.facts, name) and {"device": s.device},
            f"{name} is not supported on this device ({{device}})", device=True) for name in ("bf16", "fp16")),
    error("torch_autocast.dtype", lambda s, dtype: s.v.torch_autocast.enabled and dtype in FP16_NAMES and s.stage,
          "works at ZeRO stage 0 only: the others clip gradients still multiplied by the loss scale; use fp16, or "
          "bfloat16"),
    error("torch_autocast.enabled", lambda s, on: on and s.v.zero_optimization.zero_quantized_weights,
          "does not work with zero_optimization.zero_quantized_weights",
          "runtime/torch_autocast.py, _validate_auto_cast_settings"),
    error("data_types.param_dtype", lambda s, dtype: dtype is not None and dtype not in _NAMES[s.precision]
          and {"precision": s.precision}, 'must equal the training precision, "{precision}"; or leave it out'),
    error("data_types.grad_accum_dtype", lambda s, dtype: dtype is not None and s.stage == 0
          and dtype not in _NAMES[s.precision] and {"precision": s.precision},
          'must be "{precision}" at ZeRO stage 0; set zero_optimization.stage >= 1',
          "engine.py, _do_optimizer_sanity_check"),
    error("data_types.keep_in_fp32_modules", lambda s, patterns: not (patterns == "auto" or isinstance(patterns, list)),
          'expected "auto" or a list of name patterns'),
    error("bf16.bf16_master_weights_and_grads bf16.bf16_optimizer_states fp16.fp16_master_weights_and_grads",
          lambda s, on: on and s.stage == 0, "needs ZeRO stage 1, 2 or 3",
          "config.py, base_optimizer.py: whether or not bf16 or fp16 is enabled"),
    error("bf16.bf16_optimizer_states", lambda s, on: on and not s.v.bf16.bf16_master_weights_and_grads,
          "needs bf16.bf16_master_weights_and_grads = true"),
    error("bf16.bf16_master_weights_and_grads", lambda s, on: on and not s.v.bf16.bf16_optimizer_states
          and not s.offloaded, f"needs bf16.bf16_optimizer_states = true, or {_ADAM_ON_CPU}"),
    error("fp16.fp16_master_weights_and_grads", lambda s, on: on and not s.offloaded, f"needs {_ADAM_ON_CPU}"),
    error("fp16.loss_scale_window fp16.min_loss_scale", lambda s, value: s.v.fp16.enabled
          and s.v.fp16.loss_scale == 0 and value <= 0, "must be > 0 with dynamic loss scaling (fp16.loss_scale = 0)",
          "runtime/precision_config.py, _validate_dynamic_loss_scale_params"),
    warning("data_types.grad_accum_dtype", lambda s, dtype: s.v.bf16.enabled is True and dtype is None
            and s.batch is not None and s.batch.accumulation > _ACCUMULATION_THAT_ROUNDS
            and {"accumulation": s.batch.accumulation},
            '{accumulation} micro batches are summed in bf16, which rounds; set data_types.grad_accum_dtype = "fp32"',
            absent=True, late=True),
    note("bf16.bf16_master_weights_and_grads", lambda s, on: on,
         "bf16 master weights lose small updates; compare with fp32 ones"),
    note("fp16.loss_scale", lambda s, scale: s.v.fp16.enabled is True and scale,
         "a fixed scale cannot follow an overflow; 0 lets DeepSpeed adapt it"),
    note("fp16.enabled", lambda s, on: on is True and s.facts.kind == "cuda" and s.facts.bf16 and s.facts.certain,
         "this device has bf16, which needs no loss scaling"),
    note("communication_data_type", lambda s, dtype: dtype in ("fp16", "bf16") and dtype != s.precision
         and s.ranks == 1 and {"dtype": dtype},
         "one rank sends nothing, and DeepSpeed rounds the gradients to {dtype} all the same"),
    warning("communication_data_type", lambda s, dtype: dtype == "fp16" and s.v.fp16.enabled is not True,
            "fp16 overflows on gradients that nobody scales; use bf16, or leave it out"),

    # ZeRO, offload, reduction.
    error(" ".join(CUDA_ONLY), lambda s, on: on and s.facts.kind == "cpu" and {"device": s.device},
          "works on CUDA only; this device is {device}", device=True),
    error("zero_optimization.allgather_bucket_size", lambda s, bucket: s.stage in (1, 2) and isinstance(bucket, int)
          and (bucket % 2 or bucket == 0), "must be an even number > 0", "zero/stage_1_and_2.py: 4-byte alignment"),
    error("zero_optimization.compute_grad_norm", lambda s, on: not on and s.stage not in (1, 2),
          "false is possible at ZeRO stages 1 and 2 only"),
    error("zero_optimization.compute_grad_norm", lambda s, on: not on and s.v.gradient_clipping > 0,
          "false needs gradient_clipping = 0"),
    error("zero_optimization.compute_grad_norm",
          lambda s, on: not on and s.v.zero_optimization.offload_optimizer.device != "none",
          "false does not work with optimizer offload"),
    error("zero_optimization.compute_grad_norm", lambda s, on: not on and s.stage == 1 and s.v.bf16.enabled
          and s.v.data_types.grad_accum_dtype in FP32_NAMES,
          "false does not work with bf16, fp32 accumulation and stage 1"),
    error("zero_optimization.elastic_checkpoint", lambda s, on: on and s.stage > 0,
          "DeepSpeed cannot load what it saves with it; delete it: a resume takes any number of ranks without it",
          "zero/stage_1_and_2.py, _restore_step_from_elastic_checkpoint; zero/stage3.py no longer has it"),
    warning("zero_optimization.load_from_fp32_weights", lambda s, on: not on and s.stage in (1, 2)
            and s.precision != "fp32" and {"precision": s.precision},
            "false rounds the weights to {precision} at every resume, which is then not the same run; delete it"),
    error("zero_optimization.zero_hpz_partition_size",
          lambda s, size: size > 1 and s.ranks % size and {"ranks": s.ranks},
          "must divide the number of ranks, {ranks}"),
    error("data_parallel_size", lambda s, size: size is not None and size != s.ranks and {"ranks": s.ranks},
          "must be the number of ranks, {ranks}; or leave it out"),
    *(error(old, lambda s, _, section=section, old=old: section in s.v and old in s.v,
            f"deprecated, and {section} stands here too; keep the latter") for section, old in _OFFLOADS.items()),
    *(error(f"{section}.nvme_path", lambda s, path, section=section: s.v[f"{section}.device"] == "nvme" and not path,
            'must be given for device "nvme": a folder on the NVMe drive', absent=True) for section in _OFFLOADS),
    error("zero_optimization.offload_optimizer.device",
          lambda s, device: device == "nvme" and s.stage in (1, 2) and {"stage": s.stage},
          '"nvme" needs ZeRO stage 3; at stage {stage} use "cpu"'),
    error("zero_optimization.offload_optimizer.ratio", lambda s, ratio: ratio < 1.0 and s.stage != 3,
          "below 1 needs ZeRO stage 3"),
    error("zero_optimization.offload_optimizer.super_offload", lambda s, on: on and s.stage != 3, "needs ZeRO stage 3"),
    error("gradient_predivide_factor", lambda s, factor: factor != 1.0 and _scatters(s), _SCATTERED, _STAGES_2_3),
    error("prescale_gradients", lambda s, on: on and _scatters(s), _SCATTERED, _STAGES_2_3),
    error("gradient_allreduce_op", lambda s, op: op == "sum" and s.stage == 3,
          '"sum" does not work at ZeRO stage 3; use "mean"', "runtime/config.py, _do_error_check"),
    error("gradient_allreduce_op", lambda s, op: op == "sum" and s.v.compile.deepcompile,
          '"sum" does not work with compile.deepcompile; use "mean"'),
    warning("gradient_allreduce_op", lambda s, op: op == "sum" and s.ranks > 1 and {"ranks": s.ranks},
            "gradients, their norm and what is clipped are {ranks} times those of the mean"),
    warning("zero_optimization.overlap_comm", lambda s, on: on and s.stage in (1, 2) and {"stage": s.stage},
            "races were reported at ZeRO stage {stage} (DeepSpeed #8061, #5545), with NaN or slow divergence; "
            "false is safer"),
    note("zero_optimization.stage", lambda s, stage: stage == 3 and _is_alone(s),
         "one rank has nobody to share with: stage 3 costs time and saves no memory here"),
    *(note(f"{_ZERO}.{name}", lambda s, _, name=name: _bucket(s, f"{_ZERO}.{name}"),
           "is beyond the model's {n_params} parameters{waste}; \"auto\" takes the model's size",
           "DeepSpeed #1302; zero/stage_1_and_2.py, zero/stage3.py", late=True)
      for name in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")),

    # Activation checkpointing, compilation.
    error("chatgot.activation_checkpointing", lambda s, _: _RECOMPUTATION not in s.v
          and _refinement(s) is not None and {"value": _refinement(s)},
          'does nothing without the DeepSpeed section "activation_checkpointing": {{}}; add it'),
    adapted(_RECOMPUTATION, lambda s, on: on and not s.needs_deepspeed() and _refinement(s) is None
            and {"value": s.tree[_RECOMPUTATION]}, "recomputes every block, by torch.utils.checkpoint. DeepSpeed "
            "itself leaves that to the model's code; delete the section to keep all activations"),
    error(" ".join(f"{_RECOMPUTATION}.{key}" for key in RECOMPUTATION_OF_DEEPSPEED),
          lambda s, on: on and s.chatgot.activation_checkpointing.backend == "torch",
          'only the backend "deepspeed" does this, and chatgot.activation_checkpointing says "torch"'),
    error("chatgot.activation_checkpointing.backend",
          lambda s, backend: backend == "deepspeed" and _RECOMPUTATION in s.v and s.v.torch_autocast.enabled,
          'gives wrong gradients under torch_autocast; use "torch"',
          "runtime/activation_checkpointing/checkpointing.py: recomputes without the autocast state"),
    *(error(f"{_RECOMPUTATION}.{key}", lambda s, _, key=key: s.v.torch_autocast.enabled
            and s.chatgot.activation_checkpointing.backend == "auto" and s.needs_deepspeed()[:1] == [key],
            "needs the backend that gives wrong gradients under torch_autocast; delete it")
      for key in RECOMPUTATION_OF_DEEPSPEED),
    error("activation_checkpointing.contiguous_memory_optimization",
          lambda s, on: on and not s.v.activation_checkpointing.partition_activations,
          "needs activation_checkpointing.partition_activations = true"),
    adapted("activation_checkpointing.contiguous_memory_optimization",
            lambda s, on: on and not s.v.activation_checkpointing.number_checkpoints,
            "needs activation_checkpointing.number_checkpoints, which is not given: the number of recomputed blocks"),
    warning("activation_checkpointing.partition_activations", lambda s, on: on,
            "saves nothing here: DeepSpeed shares activations over model-parallel ranks only, and ChatGoT has none"),
    error("compile.deepcompile", lambda s, on: on and not s.chatgot.compile.enabled,
          "does nothing with chatgot.compile.enabled = false; take one of them out"),
    adapted("compile.deepcompile", lambda s, on: on and (s.stage == 0 or not s.states("chatgot.compile.enabled")),
            "turns chatgot.compile.enabled on; at ZeRO stage 0 torch.compile does the work, as in DeepSpeed itself",
            "engine.py, get_deepcompile_backend"),
    error("chatgot.compile.mode", lambda s, mode: s.v.compile.deepcompile and s.stage > 0 and mode != "default",
          'is for torch.compile, and compile.deepcompile takes its place; use "default"',
          "engine.py, compile: torch hands the mode to a backend that takes none"),
    error("chatgot.compile.mode", lambda s, _: s.facts.kind == "cuda" and s.chatgot.compile.enabled
          and s.chatgot.compile.mode != "default" and s.stage < 2 and s.batch is not None and s.batch.accumulation > 1
          and {"value": s.chatgot.compile.mode, "accumulation": s.batch.accumulation},
          'makes CUDA graphs, which overwrite gradients that wait for the next micro-batch (accumulation '
          '{accumulation}); use "default", ZeRO stage 2, or a micro-batch that needs no accumulation', late=True),

    *optimizers.RULES,

    # What is looked at, and what is not stated.
    note("timers.throughput.enabled", lambda s, on: on and s.facts.kind == "cuda" and s.v.timers.throughput.synchronized
         and {"value": ABSENT if s.is_unstated("timers.throughput.enabled") else True},
         "DeepSpeed waits for the device twice in every micro-batch to measure it, which slows training down; set it "
         "to false: ChatGoT measures tokens per second itself"),
    note("wall_clock_breakdown memory_breakdown flops_profiler.enabled comms_logger.enabled", lambda s, on: on,
         "slows training down: it waits for the device to measure it"),
    note("tensorboard.enabled csv_monitor.enabled comet.enabled", lambda s, on: on,
         "gets the metrics of metrics.jsonl by their names and steps, beside DeepSpeed's own, which count samples"),
    warning("disable_python_gc", lambda s, on: on, "nobody collects garbage then, and memory may grow until the end"),
    note("gradient_clipping", lambda s, _: s.is_unstated("gradient_clipping") and {"now": "1.0", "before": "0"},
         _UNSTATED, "DeepSpeed #8068", absent=True),
    note("bf16.check_grad_overflow", lambda s, _: s.v.bf16.enabled and s.is_unstated("bf16.check_grad_overflow")
         and {"now": "true", "before": "false"}, _UNSTATED, "DeepSpeed #8035", absent=True),
    *(note(f"{section}.pin_memory", lambda s, _, section=section: s.v[f"{section}.device"] != "none"
           and s.is_unstated(f"{section}.pin_memory") and {"now": "true", "before": "false"},
           _UNSTATED, "DeepSpeed #8207", absent=True) for section in _OFFLOADS),
    note("train_batch_size", lambda s, total: s.batch is not None and total in (None, "auto")
         and s.v.gradient_accumulation_steps in (None, "auto") and {"total": s.batch.total},
         "is not stated: {total} follows from the number of ranks, and so does what is learned; state it to keep it",
         absent=True, late=True),

    *machine.RULES,
)
