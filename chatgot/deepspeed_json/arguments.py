"""The optimizer and the scheduler: which one is built, what it takes, and where it can work."""

from __future__ import annotations

from typing import Any

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.chatgot_section import ChatGoTSection
from chatgot.deepspeed_json.findings import Findings
from chatgot.deepspeed_json.schema import Key
from chatgot.deepspeed_json.suggestions import meant
from chatgot.deepspeed_json.values import Values, read_arguments
from chatgot.devices import DeviceFacts


def optimizer_arguments(kind: str, params: dict[str, Any], offloaded: bool) -> str:
    """Which entry of OPTIMIZER_PARAMS describes the optimizer that DeepSpeed builds (engine.py,
    _configure_basic_optimizer).
    """
    name = kind.lower()
    if name in ("adam", "adamw"):
        return "adam/torch" if params.get("torch_adam") else "adam/cpu" if offloaded else "adam/fused"
    if name == "adagrad":
        return "adagrad/cpu" if offloaded else "adagrad/torch"
    if name == "lion":
        return "lion/cpu" if offloaded else "lion/fused"
    if name in schema.DEEPSPEED_OPTIMIZERS:
        return name
    return f"torch.{kind}"


def is_offloaded(values: Values) -> bool:
    """Whether the optimizer state lives outside the device."""
    return values["zero_optimization.offload_optimizer.device"] != "none" or bool(
        values["zero_optimization.cpu_offload"]
    )


def given_arguments(tree: dict[str, Any], section: str) -> dict[str, Any]:
    """The params of the optimizer or scheduler section; empty where there are none, or no mapping."""
    parent = tree.get(section)
    params = parent.get("params") if isinstance(parent, dict) else None
    return params if isinstance(params, dict) else {}


def known_arguments(values: Values, tree: dict[str, Any], section: str) -> dict[str, Key]:
    """What the optimizer or scheduler of this configuration takes; empty for one that nobody knows."""
    kind = values[f"{section}.type"]
    if not isinstance(kind, str):
        return {}
    if section == "scheduler":
        return schema.SCHEDULER_PARAMS.get(kind, {})
    return schema.OPTIMIZER_PARAMS.get(
        optimizer_arguments(kind, given_arguments(tree, section), is_offloaded(values)), {}
    )


def check_optimizer(values: Values, tree: dict[str, Any], facts: DeviceFacts, findings: Findings) -> None:
    """The optimizer's type, its arguments, and whether it can work where the other keys put it."""
    if "optimizer" not in tree and not any(finding.suggestion == "optimizer" for finding in findings.all):
        findings.missing("optimizer", "must be given: without it there is nothing to train with")
    kind = values["optimizer.type"]
    if not isinstance(kind, str):
        return
    name = kind.lower()
    refused = schema.REFUSED_OPTIMIZERS.get(name) or schema.REFUSED_OPTIMIZERS.get(kind)
    if refused:
        findings.error("optimizer.type", kind, f"{refused}; use AdamW or Muon")
        return
    if name not in schema.DEEPSPEED_OPTIMIZERS and kind not in schema.TORCH_OPTIMIZERS:
        known = ("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon", *schema.TORCH_OPTIMIZERS)
        why = "unknown optimizer, DeepSpeed fails when it builds it"
        findings.error("optimizer.type", kind, why, allowed="one of " + ", ".join(known), suggestion=meant(kind, known))
        return
    params = given_arguments(tree, "optimizer")
    stage = values["zero_optimization.stage"]
    offloaded = is_offloaded(values)
    variant = optimizer_arguments(kind, params, offloaded)
    elsewhere = {
        "max_grad_norm": "DeepSpeed clips by the top-level key gradient_clipping",
        **({k: "torch.optim.AdamW takes it: add \"torch_adam\": true" for k in ("foreach", "fused", "maximize", "capturable")}
           if variant in ("adam/fused", "adam/cpu") else {}),
    }  # fmt: skip
    owner = {
        "adam/fused": f"DeepSpeed's fused {kind}",
        "adam/cpu": f"DeepSpeed's CPU {kind}",
        "adam/torch": f"torch's {kind}",
    }.get(variant, kind)
    read_arguments(params, schema.OPTIMIZER_PARAMS[variant], owner, "optimizer.params", findings, elsewhere)
    if name not in schema.ZERO_TESTED_OPTIMIZERS and stage > 0 and not values["zero_allow_untested_optimizer"]:
        findings.error(
            "optimizer.type",
            kind,
            "DeepSpeed did not test it with ZeRO; add zero_allow_untested_optimizer = true to use it",
        )
    if name in schema.CUDA_OPTIMIZERS and variant != "lion/cpu" and facts.kind == "cpu":
        findings.device(facts, "optimizer.type", kind, "its kernel exists for CUDA only; use AdamW")
    if name == "lamb" and offloaded:
        findings.error(
            "optimizer.type",
            kind,
            "its kernel cannot step on offloaded state; use AdamW, or offload_optimizer.device = none",
        )
    if name == "lamb" and values["fp16.loss_scale"] != 0:
        findings.error(
            values.name("fp16.loss_scale"), values["fp16.loss_scale"], "lamb needs dynamic loss scaling; set 0"
        )
    if variant == "adam/fused" and params.get("amsgrad") is True:
        findings.error(
            "optimizer.params.amsgrad", True, 'DeepSpeed\'s fused Adam does not have it; add "torch_adam": true'
        )
    if variant == "adam/torch" and params.get("fused") and params.get("foreach"):
        findings.error("optimizer.params.foreach", True, "torch takes fused or foreach, not both")
    if name == "adamw" and params.get("adam_w_mode") is False:
        findings.error(
            "optimizer.params.adam_w_mode", False, 'DeepSpeed ignores it for AdamW; set optimizer.type = "Adam"'
        )
    if name == "muon":
        _check_muon(values, stage, offloaded, params, findings)


def _check_muon(values: Values, stage: int, offloaded: bool, params: dict[str, Any], findings: Findings) -> None:
    kind = values["optimizer.type"]
    if stage == 3 and values["zero_optimization.reduce_scatter"]:  # zero/stage3.py
        findings.error("optimizer.type", kind, "Muon at ZeRO stage 3 needs zero_optimization.reduce_scatter = false")
    if offloaded:
        findings.error(
            "optimizer.type",
            kind,
            "Muon does not work with optimizer offload; use AdamW, or offload_optimizer.device = none",
        )
    if params.get("per_head_muon"):
        findings.error("optimizer.params.per_head_muon", True, "needs a transformers model; delete it")


def check_scheduler(values: Values, tree: dict[str, Any], chatgot: ChatGoTSection, findings: Findings) -> None:
    """The stock scheduler's type and arguments, and that nothing else moves the learning rate."""
    if "scheduler" not in values:
        return
    if chatgot.schedule is not None:
        findings.error(
            "scheduler",
            tree["scheduler"],
            "chatgot.schedule stands here too, and both would move the lr; keep one of them",
        )
    kind = values["scheduler.type"]
    if not isinstance(kind, str):
        return
    if kind in schema.REFUSED_SCHEDULERS:
        findings.error("scheduler.type", kind, f"{schema.REFUSED_SCHEDULERS[kind]}; use chatgot.schedule")
        return
    if kind not in schema.SCHEDULER_PARAMS:
        known = tuple(schema.SCHEDULER_PARAMS)
        why = "unknown scheduler, DeepSpeed fails when it builds it"
        findings.error("scheduler.type", kind, why, allowed="one of " + ", ".join(known), suggestion=meant(kind, known))
        return
    params = tree["scheduler"].get("params")
    if params is None:
        findings.missing(
            "scheduler.params", f"must be given, DeepSpeed fails without it; {{}} for {kind}'s own defaults"
        )
    elif isinstance(params, dict):
        read_arguments(params, schema.SCHEDULER_PARAMS[kind], kind, "scheduler.params", findings, {})
