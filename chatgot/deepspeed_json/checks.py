"""Rules between keys of the DeepSpeed JSON: what DeepSpeed 0.19.8 refuses late, does wrongly, or drops in silence.

Each rule names its source: a file of DeepSpeed, or what was measured with it.
"""

from __future__ import annotations

from typing import Any

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.arguments import check_optimizer, check_scheduler
from chatgot.deepspeed_json.chatgot_section import ChatGoTSection
from chatgot.deepspeed_json.findings import Findings
from chatgot.deepspeed_json.values import Values
from chatgot.devices import DeviceFacts

DEEPSPEED_ONLY_RECOMPUTATION = (
    "partition_activations",
    "contiguous_memory_optimization",
    "cpu_checkpointing",
    "synchronize_checkpoint_boundary",
    "profile",
)
"""Keys of activation_checkpointing that torch.utils.checkpoint cannot honour."""


def check_all(
    values: Values,
    tree: dict[str, Any],
    chatgot: ChatGoTSection,
    facts: DeviceFacts,
    world_size: int,
    findings: Findings,
) -> None:
    """Every rule; what is wrong is added to `findings`."""
    _check_unsupported(values, tree, findings)
    _check_precision(values, facts, findings)
    _check_zero(values, facts, world_size, findings)
    _check_offload(values, findings)
    _check_reduction(values, findings)
    check_optimizer(values, tree, facts, findings)
    check_scheduler(values, tree, chatgot, findings)
    _check_activation_checkpointing(values, tree, chatgot, facts, findings)
    _check_compile(values, chatgot, findings)


def _refuse(findings: Findings, values: Values, dotted: str, message: str, value: Any = None) -> None:
    findings.error(values.name(dotted), values[dotted] if value is None else value, message)


def _check_unsupported(values: Values, tree: dict[str, Any], findings: Findings) -> None:
    for dotted, (allowed, reason) in schema.UNSUPPORTED.items():
        if dotted in schema.NODES and isinstance(schema.NODES[dotted], schema.Section):
            if dotted in values:
                findings.error(values.name(dotted), "{...}", reason)
        elif dotted in values and values[dotted] not in allowed:
            _refuse(findings, values, dotted, reason)
    if "weight_quantization" in values and "weight_quantization.enabled" not in values:
        findings.error(
            "weight_quantization", tree["weight_quantization"], schema.UNSUPPORTED["weight_quantization.enabled"][1]
        )
    if "allgather_size" in values and not isinstance(tree.get("zero_optimization"), bool):
        _refuse(
            findings,
            values,
            "allgather_size",
            "DeepSpeed ignores it here; write zero_optimization.allgather_bucket_size",
        )


# ------------------------------------------------------------------------------------------------------------------------ precision


def _check_precision(values: Values, facts: DeviceFacts, findings: Findings) -> None:
    bf16, fp16, autocast = values["bf16.enabled"], values["fp16.enabled"], values["torch_autocast.enabled"]
    device = facts.name or facts.kind
    works = " or ".join(
        [*(["bf16"] if facts.bf16 else []), *(["fp16"] if facts.fp16 else []), "fp32 (neither section)"]
    )
    if bf16 and fp16:
        _refuse(findings, values, "fp16.enabled", "bf16.enabled is true too; enable one of them")
    for on, name, supported in ((bf16, "bf16", facts.bf16), (fp16, "fp16", facts.fp16)):
        if on and not supported:
            dotted = values.name(f"{name}.enabled")
            findings.device(facts, dotted, True, f"{name} is not supported on this device ({device}); use {works}")
        # An extra optimizer step with zero gradients runs when the 16-bit wrapper of stage 0 starts
        # (fp16/unfused_optimizer.py).
        if on and values["zero_optimization.stage"] == 0:
            _refuse(
                findings,
                values,
                f"{name}.enabled",
                f"{name} at ZeRO stage 0 starts wrongly (DeepSpeed takes one optimizer step before training); "
                "set zero_optimization.stage = 1, also on one GPU",
            )
    if autocast:
        _check_autocast(values, facts, device, findings)
    _check_data_types(values, bool(bf16), bool(fp16), findings)
    _check_master_weights(values, findings)
    if fp16 and values["fp16.loss_scale"] == 0:  # runtime/precision_config.py, _validate_dynamic_loss_scale_params
        for name in ("loss_scale_window", "min_loss_scale"):
            if values[f"fp16.{name}"] <= 0:
                _refuse(findings, values, f"fp16.{name}", "must be > 0 with dynamic loss scaling (fp16.loss_scale = 0)")


def _check_master_weights(values: Values, findings: Findings) -> None:
    """16-bit master weights and states; DeepSpeed checks these whether or not bf16 or fp16 is enabled (config.py,
    base_optimizer.py).
    """
    masters, states = values["bf16.bf16_master_weights_and_grads"], values["bf16.bf16_optimizer_states"]
    offloaded = (
        values["zero_optimization.offload_optimizer.device"] != "none" or values["zero_optimization.cpu_offload"]
    )
    adam_on_cpu = 'zero_optimization.offload_optimizer.device = "cpu" with an adam optimizer'
    for dotted in (
        "bf16.bf16_master_weights_and_grads",
        "bf16.bf16_optimizer_states",
        "fp16.fp16_master_weights_and_grads",
    ):
        if values[dotted] and values["zero_optimization.stage"] == 0:
            _refuse(findings, values, dotted, "needs ZeRO stage 1, 2 or 3")
    if states and not masters:
        _refuse(findings, values, "bf16.bf16_optimizer_states", "needs bf16.bf16_master_weights_and_grads = true")
    if masters and not states and not offloaded:
        message = f"needs bf16.bf16_optimizer_states = true, or {adam_on_cpu}"
        _refuse(findings, values, "bf16.bf16_master_weights_and_grads", message)
    if values["fp16.fp16_master_weights_and_grads"] and not offloaded:
        _refuse(findings, values, "fp16.fp16_master_weights_and_grads", f"needs {adam_on_cpu}")


def _check_autocast(values: Values, facts: DeviceFacts, device: str, findings: Findings) -> None:
    dtype = values["torch_autocast.dtype"]
    if dtype is None:
        findings.missing(
            "torch_autocast.dtype", 'must be given when torch_autocast is enabled: "bfloat16" or "float16"'
        )
    elif dtype in schema.BF16_NAMES and not facts.bf16:
        findings.device(facts, "torch_autocast.dtype", dtype, f"bf16 is not supported on this device ({device})")
    elif dtype in schema.FP16_NAMES and not facts.fp16:
        findings.device(facts, "torch_autocast.dtype", dtype, f"fp16 is not supported on this device ({device})")
    if dtype in schema.FP16_NAMES and values["zero_optimization.stage"]:
        message = "works at ZeRO stage 0 only: the others clip gradients still multiplied by the loss scale; use fp16, or bfloat16"
        _refuse(findings, values, "torch_autocast.dtype", message)
    for name in ("bf16", "fp16"):
        if values[f"{name}.enabled"]:
            _refuse(
                findings,
                values,
                "torch_autocast.enabled",
                f"{name}.enabled is true too; autocast keeps fp32 parameters, {name} casts them: enable one of them",
            )
    if values["zero_optimization.zero_quantized_weights"]:  # runtime/torch_autocast.py, _validate_auto_cast_settings
        _refuse(
            findings, values, "torch_autocast.enabled", "does not work with zero_optimization.zero_quantized_weights"
        )


def _check_data_types(values: Values, bf16: bool, fp16: bool, findings: Findings) -> None:
    mode = "bf16" if bf16 else "fp16" if fp16 else "fp32"
    names = {"bf16": schema.BF16_NAMES, "fp16": schema.FP16_NAMES, "fp32": schema.FP32_NAMES}[mode]
    if values["data_types.param_dtype"] is not None and values["data_types.param_dtype"] not in names:
        _refuse(
            findings, values, "data_types.param_dtype", f'must equal the training precision, "{mode}"; or leave it out'
        )
    accumulation = values["data_types.grad_accum_dtype"]
    stage = values["zero_optimization.stage"]
    if accumulation is not None and stage == 0 and accumulation not in names:  # engine.py, _do_optimizer_sanity_check
        _refuse(
            findings,
            values,
            "data_types.grad_accum_dtype",
            f'must be "{mode}" at ZeRO stage 0; set zero_optimization.stage >= 1',
        )
    patterns = values["data_types.keep_in_fp32_modules"]
    if not (patterns == "auto" or isinstance(patterns, list)):
        _refuse(findings, values, "data_types.keep_in_fp32_modules", 'expected "auto" or a list of name patterns')


# ----------------------------------------------------------------------------------------------------------------------------- ZeRO


def _check_zero(values: Values, facts: DeviceFacts, world_size: int, findings: Findings) -> None:
    stage = values["zero_optimization.stage"]
    zero = "zero_optimization."
    if facts.kind == "cpu":
        for dotted in schema.CUDA_ONLY:
            if values[dotted]:
                device = facts.name or facts.kind
                findings.device(
                    facts, values.name(dotted), values[dotted], f"works on CUDA only; this device is {device}"
                )
    bucket = values[zero + "allgather_bucket_size"]
    if (
        stage in (1, 2) and isinstance(bucket, int) and (bucket % 2 or bucket == 0)
    ):  # zero/stage_1_and_2.py: 4-byte alignment
        _refuse(findings, values, zero + "allgather_bucket_size", "must be an even number > 0")
    if not values[zero + "compute_grad_norm"]:
        if stage not in (1, 2):
            _refuse(findings, values, zero + "compute_grad_norm", "false is possible at ZeRO stages 1 and 2 only")
        if values["gradient_clipping"] > 0:
            _refuse(findings, values, zero + "compute_grad_norm", "false needs gradient_clipping = 0")
        if values[zero + "offload_optimizer.device"] != "none":
            _refuse(findings, values, zero + "compute_grad_norm", "false does not work with optimizer offload")
        if stage == 1 and values["bf16.enabled"] and values["data_types.grad_accum_dtype"] in schema.FP32_NAMES:
            _refuse(
                findings,
                values,
                zero + "compute_grad_norm",
                "false does not work with bf16, fp32 accumulation and stage 1",
            )
    if stage == 3 and values[zero + "elastic_checkpoint"]:
        _refuse(findings, values, zero + "elastic_checkpoint", "stage 3 no longer has it; delete it")
    hpz = values[zero + "zero_hpz_partition_size"]
    if hpz > 1 and world_size % hpz:
        _refuse(findings, values, zero + "zero_hpz_partition_size", f"must divide the number of ranks, {world_size}")
    data_parallel = values["data_parallel_size"]
    if data_parallel is not None and data_parallel != world_size:
        _refuse(findings, values, "data_parallel_size", f"must be the number of ranks, {world_size}; or leave it out")


def _check_offload(values: Values, findings: Findings) -> None:
    stage = values["zero_optimization.stage"]
    param, optimizer = "zero_optimization.offload_param", "zero_optimization.offload_optimizer"
    if values[f"{param}.device"] != "none" and stage != 3:
        _refuse(
            findings,
            values,
            f"{param}.device",
            f"DeepSpeed ignores it at ZeRO stage {stage}; set zero_optimization.stage = 3",
        )
    if values["zero_optimization.cpu_offload_param"] and stage != 3:
        _refuse(
            findings,
            values,
            "zero_optimization.cpu_offload_param",
            f"DeepSpeed ignores it at ZeRO stage {stage}; needs stage 3",
        )
    if values[f"{optimizer}.device"] != "none" and stage == 0:
        _refuse(
            findings,
            values,
            f"{optimizer}.device",
            "DeepSpeed ignores it at ZeRO stage 0; set zero_optimization.stage >= 1",
        )
    if values["zero_optimization.cpu_offload"] and stage == 0:
        _refuse(
            findings, values, "zero_optimization.cpu_offload", "DeepSpeed ignores it at ZeRO stage 0; needs stage >= 1"
        )
    for section, old in ((param, "cpu_offload_param"), (optimizer, "cpu_offload")):
        if section in values and f"zero_optimization.{old}" in values:
            _refuse(
                findings,
                values,
                f"zero_optimization.{old}",
                f"deprecated, and {section} stands here too; keep the latter",
            )
        if values[f"{section}.device"] == "nvme" and not values[f"{section}.nvme_path"]:
            findings.missing(f"{section}.nvme_path", 'must be given for device "nvme": a folder on the NVMe drive')
    if values[f"{optimizer}.device"] == "nvme" and stage in (1, 2):
        _refuse(findings, values, f"{optimizer}.device", f'"nvme" needs ZeRO stage 3; at stage {stage} use "cpu"')
    if values[f"{optimizer}.ratio"] < 1.0 and stage != 3:
        _refuse(findings, values, f"{optimizer}.ratio", "below 1 needs ZeRO stage 3")
    if values[f"{optimizer}.super_offload"] and stage != 3:
        _refuse(findings, values, f"{optimizer}.super_offload", "needs ZeRO stage 3")


def _check_reduction(values: Values, findings: Findings) -> None:
    stage = values["zero_optimization.stage"]
    if stage in (2, 3) and values["zero_optimization.reduce_scatter"]:  # zero/stage_1_and_2.py, zero/stage3.py
        advice = (
            f"does not work with reduce_scatter at ZeRO stage {stage}; set zero_optimization.reduce_scatter = false"
        )
        if values["gradient_predivide_factor"] != 1.0:
            _refuse(findings, values, "gradient_predivide_factor", advice)
        if values["prescale_gradients"]:
            _refuse(findings, values, "prescale_gradients", advice)
    if values["gradient_allreduce_op"] == "sum" and stage == 3:  # runtime/config.py, _do_error_check
        _refuse(findings, values, "gradient_allreduce_op", '"sum" does not work at ZeRO stage 3; use "mean"')
    if values["gradient_allreduce_op"] == "sum" and values["compile.deepcompile"]:
        _refuse(findings, values, "gradient_allreduce_op", '"sum" does not work with compile.deepcompile; use "mean"')


# ------------------------------------------------------------------------------------------------ activation
# checkpointing, compile


def _check_activation_checkpointing(
    values: Values, tree: dict[str, Any], chatgot: ChatGoTSection, facts: DeviceFacts, findings: Findings
) -> None:
    section = "activation_checkpointing"
    refinement = tree.get("chatgot", {}).get(section) if isinstance(tree.get("chatgot"), dict) else None
    if section not in values:
        if refinement is not None:
            findings.error(
                f"chatgot.{section}",
                refinement,
                'does nothing without the DeepSpeed section "activation_checkpointing": {}; add it',
            )
        return
    wanted = [key for key in DEEPSPEED_ONLY_RECOMPUTATION if values[f"{section}.{key}"]]
    backend = chatgot.activation_checkpointing.backend
    if backend == "torch":
        for key in wanted:
            _refuse(
                findings,
                values,
                f"{section}.{key}",
                'only the backend "deepspeed" does this, and chatgot.activation_checkpointing says "torch"',
            )
    # DeepSpeed's checkpoint() recomputes without the autocast state
    # (runtime/activation_checkpointing/checkpointing.py).
    if values["torch_autocast.enabled"] and backend == "deepspeed":
        findings.error(f"chatgot.{section}.backend", backend, 'gives wrong gradients under torch_autocast; use "torch"')
    if values["torch_autocast.enabled"] and backend == "auto" and wanted:
        _refuse(
            findings,
            values,
            f"{section}.{wanted[0]}",
            "needs the backend that gives wrong gradients under torch_autocast; delete it",
        )
    if values[f"{section}.contiguous_memory_optimization"]:
        if not values[f"{section}.partition_activations"]:
            _refuse(
                findings,
                values,
                f"{section}.contiguous_memory_optimization",
                f"needs {section}.partition_activations = true",
            )
        if not values[f"{section}.number_checkpoints"]:
            _refuse(
                findings,
                values,
                f"{section}.contiguous_memory_optimization",
                f"needs {section}.number_checkpoints (recomputed blocks)",
            )


def _check_compile(values: Values, chatgot: ChatGoTSection, findings: Findings) -> None:
    if values["compile.deepcompile"] and not chatgot.compile.enabled:
        _refuse(findings, values, "compile.deepcompile", "does nothing without chatgot.compile.enabled = true; add it")
    if values["compile.deepcompile"] and values["zero_optimization.stage"] == 0:
        _refuse(findings, values, "compile.deepcompile", "needs ZeRO stage 1, 2 or 3")
