"""What is legal and yet wrong, unwise, without effect, or good to know: the warnings and notes about a DeepSpeed JSON.

Each rule names its source: a file of DeepSpeed 0.19.8, an issue of it, or what was measured with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chatgot.deepspeed_json import machine, schema
from chatgot.deepspeed_json.arguments import given_arguments, is_offloaded, optimizer_arguments
from chatgot.deepspeed_json.batch import Batch
from chatgot.deepspeed_json.chatgot_section import ChatGoTSection
from chatgot.deepspeed_json.findings import ABSENT, Findings
from chatgot.deepspeed_json.reach import (
    NEVER_SECTIONS,
    STAGES,
    idle,
    is_off,
    section_switch,
)
from chatgot.deepspeed_json.values import Values
from chatgot.devices import DeviceFacts

_WASTE_WORTH_A_WARNING = 64 * 2**20
"""Bytes of communication buffer beyond the model."""
_ACCUMULATION_THAT_ROUNDS = 4
_MONITORS = {"tensorboard": ("tensorboard", "tensorboardX"), "comet": ("comet_ml",), "wandb": ("wandb",)}


@dataclass(frozen=True)
class Subject:
    """What the remarks are about."""

    values: Values
    tree: dict[str, Any]
    chatgot: ChatGoTSection
    facts: DeviceFacts
    batch: Batch | None
    n_params: int | None
    world_size: int


def remark(subject: Subject, findings: Findings) -> None:
    """Every warning and note."""
    _remark_idle(subject.values, findings)
    _remark_deprecated(subject.values, findings)
    _remark_unstated_defaults(subject, findings)
    _remark_precision(subject, findings)
    _remark_zero(subject, findings)
    _remark_buckets(subject, findings)
    _remark_optimizer(subject, findings)
    _remark_scheduler(subject.values, findings)
    _remark_observation(subject.values, findings)
    _remark_machine(subject, findings)


def _warn(findings: Findings, values: Values, dotted: str, why: str) -> None:
    findings.warning(values.name(dotted), values[dotted], why)


def _note(findings: Findings, values: Values, dotted: str, why: str) -> None:
    findings.note(values.name(dotted), values[dotted], why)


# ---------------------------------------------------------------------------------------------------------------------
# without effect


def _remark_idle(values: Values, findings: Findings) -> None:
    """Sections that are off and keys that nothing reads. A key that states its default harms nobody."""
    off: dict[str, list[str]] = {}
    for dotted in values.given:
        node = schema.NODES[dotted]
        section = dotted.rpartition(".")[0]
        changed = isinstance(node, schema.Key) and values[dotted] != node.default and values[dotted] != "auto"
        if isinstance(node, schema.Section):
            switch = section_switch(dotted)
            if dotted in NEVER_SECTIONS:
                findings.note(values.name(dotted), "{...}", f"does nothing: {NEVER_SECTIONS[dotted]}")
            elif switch and switch not in values and switch not in values.spelled and values[switch] in (None, False):
                _note(findings, values, dotted, f"stands here but is off: {switch.rpartition('.')[2]} is not given")
        elif changed and section and is_off(values, section) and dotted != section_switch(section):
            off.setdefault(section, []).append(dotted)
        elif changed and (reason := idle(values, dotted)):
            level = findings.warning if dotted in STAGES else findings.note
            level(values.name(dotted), values[dotted], f"does nothing: {reason}")
    for section, keys in off.items():
        switch = section_switch(section) or section
        names = ", ".join(key.rpartition(".")[2] for key in keys)
        state = f"{values.name(switch)} = {str(values[switch]).lower()}"
        findings.note(values.name(keys[0]), values[keys[0]], f"does nothing ({names}): the section is off, {state}")


def _remark_deprecated(values: Values, findings: Findings) -> None:
    for dotted in values.given:
        node = schema.NODES[dotted]
        if isinstance(node, schema.Key) and node.instead:
            _note(findings, values, dotted, f"is deprecated: write {node.instead}")
    zero = "zero_optimization"
    if zero in values and f"{zero}.stage" in values and f"{zero}.stage" not in values.spelled:
        findings.note(zero, bool(values[f"{zero}.stage"]), 'is deprecated: write {"stage": 1} or {"stage": 0}')


def _remark_unstated_defaults(subject: Subject, findings: Findings) -> None:
    """Defaults that DeepSpeed changed in 2026 (#8068, #8035, #8207): a file without them means something else to an
    older version.
    """
    values = subject.values
    changed = {"gradient_clipping": ("1.0", "0")}
    if values["bf16.enabled"]:
        changed["bf16.check_grad_overflow"] = ("true", "false")
    for section in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
        if values[f"{section}.device"] != "none":
            changed[f"{section}.pin_memory"] = ("true", "false")
    misspelled = {finding.suggestion for finding in findings.at_level("error")}
    for dotted, (now, before) in changed.items():
        if dotted not in values and dotted not in values.spelled and dotted not in misspelled:
            why = f"is not stated: {now} since 2026, {before} before; state it, so that the file means the same everywhere"
            findings.note(values.name(dotted), ABSENT, why)
    if (
        subject.batch is not None
        and values["train_batch_size"] in (None, "auto")
        and values["gradient_accumulation_steps"] in (None, "auto")
    ):
        why = f"is not stated: {subject.batch.total} follows from the number of ranks, and so does what is learned; state it to keep it"
        findings.note("train_batch_size", ABSENT, why)


# -----------------------------------------------------------------------------------------------------------------
# precision, ZeRO


def _remark_precision(subject: Subject, findings: Findings) -> None:
    values, batch = subject.values, subject.batch
    bf16, fp16 = values["bf16.enabled"] is True, values["fp16.enabled"] is True
    accumulation = batch.accumulation if batch is not None else 1
    if bf16 and accumulation > _ACCUMULATION_THAT_ROUNDS and values["data_types.grad_accum_dtype"] is None:
        why = f'{accumulation} micro batches are summed in bf16, which rounds; set data_types.grad_accum_dtype = "fp32"'
        findings.warning(values.name("data_types.grad_accum_dtype"), ABSENT, why)
    if values["bf16.bf16_master_weights_and_grads"]:
        _note(
            findings,
            values,
            "bf16.bf16_master_weights_and_grads",
            "bf16 master weights lose small updates; compare with fp32 ones",
        )
    if fp16 and values["fp16.loss_scale"]:
        _note(findings, values, "fp16.loss_scale", "a fixed scale cannot follow an overflow; 0 lets DeepSpeed adapt it")
    if fp16 and subject.facts.kind == "cuda" and subject.facts.bf16 and subject.facts.certain:
        _note(findings, values, "fp16.enabled", "this device has bf16, which needs no loss scaling")
    if values["communication_data_type"] == "fp16" and not fp16:
        _warn(
            findings,
            values,
            "communication_data_type",
            "fp16 overflows on gradients that nobody scales; use bf16, or leave it out",
        )


def _remark_zero(subject: Subject, findings: Findings) -> None:
    values, stage = subject.values, subject.values["zero_optimization.stage"]
    if values["zero_optimization.overlap_comm"] and stage in (1, 2):
        why = f"races were reported at ZeRO stage {stage} (DeepSpeed #8061, #5545), with NaN or slow divergence; false is safer"
        _warn(findings, values, "zero_optimization.overlap_comm", why)
    offloaded = (
        is_offloaded(values)
        or values["zero_optimization.offload_param.device"] != "none"
        or values["zero_optimization.cpu_offload_param"]
    )
    if stage == 3 and subject.world_size == 1 and not offloaded:
        _note(
            findings,
            values,
            "zero_optimization.stage",
            "one rank has nobody to share with: stage 3 costs time and saves no memory here",
        )
    if values["gradient_allreduce_op"] == "sum" and subject.world_size > 1:
        why = f"gradients, their norm and what is clipped are {subject.world_size} times those of the mean"
        _warn(findings, values, "gradient_allreduce_op", why)
    section = "activation_checkpointing"
    if values[f"{section}.partition_activations"]:
        why = "saves nothing here: DeepSpeed shares activations over model-parallel ranks only, and ChatGoT has none"
        _warn(findings, values, f"{section}.partition_activations", why)


def _remark_buckets(subject: Subject, findings: Findings) -> None:
    """DeepSpeed allocates reduce_bucket_size elements whatever the model's size (#1302, zero/stage_1_and_2.py,
    zero/stage3.py).
    """
    values, n_params, stage = subject.values, subject.n_params, subject.values["zero_optimization.stage"]
    if n_params is None:
        return
    size = 2 if values["bf16.enabled"] is True or values["fp16.enabled"] is True else 4
    for name in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        dotted = f"zero_optimization.{name}"
        bucket = values[dotted]
        if (
            dotted not in values
            or not isinstance(bucket, int)
            or stage not in STAGES[dotted]
            or bucket <= n_params + n_params % 2
        ):
            continue
        waste = (bucket - n_params) * size
        buffered = name == "reduce_bucket_size"
        why = f"is beyond the model's {n_params:,} parameters"
        if buffered:
            why += f": a buffer of {bucket * size / 2**30:.2f} GiB is allocated, twice with overlap_comm"
        level = findings.warning if buffered and waste > _WASTE_WORTH_A_WARNING else findings.note
        level(values.name(dotted), bucket, f'{why}; "auto" takes the model\'s size')


# -------------------------------------------------------------------------------------------------------------
# optimizer, scheduler


def _remark_optimizer(subject: Subject, findings: Findings) -> None:
    values, stage = subject.values, subject.values["zero_optimization.stage"]
    kind = values["optimizer.type"]
    if not isinstance(kind, str):
        return
    params = given_arguments(subject.tree, "optimizer")
    if kind.lower() == "muon" and stage and values["gradient_clipping"] > 0:
        why = (
            f"stock DeepSpeed at ZeRO stage {stage} would clip Muon's orthogonalised updates to gradient_clipping = "
            f"{values['gradient_clipping']:g}, which stops it from learning; ChatGoT clips the AdamW groups only"
        )
        _note(findings, values, "optimizer.type", why)
    if kind.lower() == "adam" and "adam_w_mode" not in params:
        _note(
            findings,
            values,
            "optimizer.type",
            "DeepSpeed means AdamW by it (decoupled weight decay) unless adam_w_mode is false",
        )
    if not {"lr", "muon_lr", "adam_lr"} & set(params):
        node = schema.OPTIMIZER_PARAMS.get(optimizer_arguments(kind, params, is_offloaded(values)), {}).get("lr")
        default = f"{node.default:g}" if node is not None and node.default else "the optimizer's own"
        findings.note("optimizer.params.lr", ABSENT, f"is not stated: the default is {default}")


def _remark_scheduler(values: Values, findings: Findings) -> None:
    kind = values["scheduler.type"]
    if kind in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        peak = " and never reaches the peak" if kind == "WarmupCosineLR" else ""
        why = f"spends its first two steps at a learning rate of 0{peak} (measured with 0.19.8); chatgot.schedule does neither"
        _warn(findings, values, "scheduler.type", why)


# --------------------------------------------------------------------------------------------------------------- what
# is looked at


def _remark_observation(values: Values, findings: Findings) -> None:
    for dotted in ("wall_clock_breakdown", "memory_breakdown", "flops_profiler.enabled", "comms_logger.enabled"):
        if values[dotted]:
            _note(findings, values, dotted, "slows training down: it waits for the device to measure it")
    for section in ("tensorboard", "csv_monitor", "comet"):
        if values[f"{section}.enabled"]:
            why = "DeepSpeed writes the learning rate and the loss scale only; metrics.jsonl and wandb have the rest"
            _note(findings, values, f"{section}.enabled", why)
    if values["disable_python_gc"]:
        _warn(findings, values, "disable_python_gc", "nobody collects garbage then, and memory may grow until the end")


# ------------------------------------------------------------------------------------------------------------------------ this machine


def _remark_machine(subject: Subject, findings: Findings) -> None:
    """Packages, compilers and folders that this configuration needs and this machine lacks."""
    values = subject.values
    for section, packages in _MONITORS.items():
        if values[f"{section}.enabled"] and not machine.has_package(*packages):
            lost = "the run is not recorded there" if section == "wandb" else "DeepSpeed stops at the start"
            _warn(
                findings, values, f"{section}.enabled", f"the package {' or '.join(packages)} is not installed: {lost}"
            )
    for dotted, what in _compiled(subject).items():
        lacks = [name for name, there in _compiler(subject, dotted).items() if not there]
        if lacks:
            why = f"{what} is compiled at the first start, and this machine lacks {', '.join(lacks)}"
            findings.warning(values.name(dotted), True if dotted.startswith("chatgot") else values[dotted], why)
    for section in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
        path = values[f"{section}.nvme_path"]
        if values[f"{section}.device"] == "nvme" and path and not machine.is_writable_folder(path):
            _warn(findings, values, f"{section}.nvme_path", "is no folder that this machine can write to")


def _compiled(subject: Subject) -> dict[str, str]:
    """Key -> what DeepSpeed or torch compiles at the first start because of it."""
    values = subject.values
    found: dict[str, str] = {}
    kind, params = values["optimizer.type"], given_arguments(subject.tree, "optimizer")
    if isinstance(kind, str):
        variant = optimizer_arguments(kind, params, is_offloaded(values))
        own_adam = variant in ("adam/fused", "adam/cpu") and (
            params.get("torch_adam") is False or params.get("bias_correction") is False
        )
        if own_adam or variant in ("lamb", "lion/fused", "lion/cpu", "adagrad/cpu"):
            found["optimizer.type"] = f"DeepSpeed's {kind}"
    for section in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
        if values[f"{section}.device"] == "nvme":
            found[f"{section}.device"] = "DeepSpeed's asynchronous file access"
    if subject.chatgot.compile.enabled and subject.facts.kind == "cpu":
        found["chatgot.compile.enabled"] = "the model"
    return found


def _compiler(subject: Subject, dotted: str) -> dict[str, bool]:
    """Program -> whether it is there, for what `_compiled` says of a key."""
    needs = {"g++": machine.has_command("g++", "c++")}
    if dotted != "chatgot.compile.enabled":
        needs["ninja"] = machine.has_command("ninja") or machine.has_package("ninja")
    if dotted == "optimizer.type" and subject.facts.kind == "cuda" and not is_offloaded(subject.values):
        needs["nvcc (CUDA toolkit)"] = machine.has_cuda_compiler()
    if dotted.endswith(".device"):
        needs["libaio"] = machine.has_library("aio")
    return needs
