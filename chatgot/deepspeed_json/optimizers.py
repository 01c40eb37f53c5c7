"""The optimizer and the scheduler: what DeepSpeed builds, what it takes, where it can work, and the state it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.findings import ABSENT, meant
from chatgot.deepspeed_json.rule_types import Rule, Subject, adapted, error, note, warning
from chatgot.deepspeed_json.schema import Key
from chatgot.deepspeed_json.values import note_wrong

DEEPSPEED_OPTIMIZERS = ("adam", "adamw", "adagrad", "lamb", "lion", "muon", "muadam", "muadamw", "musgd")
TORCH_OPTIMIZERS = tuple(n.removeprefix("torch.") for n in schema.OPTIMIZER_PARAMS if n.startswith("torch."))
ZERO_TESTED_OPTIMIZERS = ("adam", "adamw", "adagrad", "lion", "muon")
ELEMENTWISE_OPTIMIZERS = ("sgd", "rmsprop", "adadelta", "adamax", "asgd", "nadam", "radam", "rprop")
"""Those of torch's whose update is the same on ZeRO's flat partitions, by their names in lower case."""
CUDA_OPTIMIZERS = ("lamb", "lion")
"""Their fused kernels exist for CUDA only; lion has a CPU version under optimizer offload."""
REFUSED_OPTIMIZERS = {
    **dict.fromkeys(
        ("muadam", "muadamw", "musgd"), "needs the mup package and base shapes that ChatGoT's model does not set"
    ),
    **dict.fromkeys(("onebitadam", "onebitlamb", "zerooneadam"), "was removed from DeepSpeed 0.19"),
    "LBFGS": "needs a closure, which DeepSpeed's step() does not give",
    "SparseAdam": "needs sparse gradients, which ChatGoT's model does not have",
}
DEEPSPEED_SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
REFUSED_SCHEDULERS = {
    "LambdaLR": "needs a Python function",
    "MultiplicativeLR": "needs a Python function",
    "ChainedScheduler": "needs scheduler objects",
    "SequentialLR": "needs scheduler objects",
    "ReduceLROnPlateau": "needs a metric, which DeepSpeed's step() does not give",
    "SWALR": "needs averaged weights, which ChatGoT does not keep",
}


def variant(s: Subject) -> str:
    """Which entry of OPTIMIZER_PARAMS describes the optimizer that DeepSpeed builds (engine.py,
    _configure_basic_optimizer).
    """
    if s.optimizer in ("adam", "adamw"):
        return "adam/torch" if s.arguments.get("torch_adam") else "adam/cpu" if s.offloaded else "adam/fused"
    if s.optimizer == "adagrad":
        return "adagrad/cpu" if s.offloaded else "adagrad/torch"
    if s.optimizer == "lion":
        return "lion/cpu" if s.offloaded else "lion/fused"
    return s.optimizer if s.optimizer in DEEPSPEED_OPTIMIZERS else f"torch.{s.v.optimizer.type}"


def known_arguments(s: Subject, section: str) -> dict[str, Key]:
    """What the optimizer or scheduler of this configuration takes; empty for one that nobody knows."""
    kind = s.v[f"{section}.type"]
    if not isinstance(kind, str):
        return {}
    if section == "scheduler":
        return schema.SCHEDULER_PARAMS.get(kind, {})
    return schema.OPTIMIZER_PARAMS.get(variant(s), {})


_OFFLOAD = "zero_optimization.offload_optimizer"
_CPU_ADAM_ONLY = (f"{_OFFLOAD}.ratio", f"{_OFFLOAD}.super_offload")
_CPU_ADAM_ONLY += ("bf16.bf16_master_weights_and_grads", "fp16.fp16_master_weights_and_grads")
"""Keys with which DeepSpeed takes no other optimizer state outside of the device than its CPUAdam's (zero/stage3.py,
zero/stage_1_and_2.py), or makes another CPUAdam of it (superoffload).
"""


def cpu_adam_key(s: Subject, arguments: dict[str, Any] | None = None) -> str:
    """The key for which DeepSpeed must build its CPUAdam; empty where torch's AdamW does the same update.

    Args:
        arguments: of the optimizer, in place of those in the JSON.
    """
    arguments = s.arguments if arguments is None else arguments
    if s.optimizer not in ("adam", "adamw") or arguments.get("torch_adam") or not s.offloaded:
        return ""
    keys = ("zero_force_ds_cpu_optimizer", *_CPU_ADAM_ONLY)
    return next((key for key in keys if key in s.v and _is_asked(s.v[key])), "")


def _is_asked(value: Any) -> bool:
    """Whether a switch is on, or a ratio below 1."""
    return value if isinstance(value, bool) else value < 1


def check_types(s: Subject) -> None:
    """Note what is wrong with the types and arguments of the optimizer and the stock scheduler."""
    if "optimizer" not in s.tree and s.is_unstated("optimizer"):
        s.findings.error("optimizer", ABSENT, "must be given: without it there is nothing to train with")
    names = ("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon", *TORCH_OPTIMIZERS)
    if _is_built(s, "optimizer", names, REFUSED_OPTIMIZERS, "AdamW or Muon"):
        elsewhere = {"max_grad_norm": "DeepSpeed clips by the top-level key gradient_clipping"}
        if variant(s) in ("adam/fused", "adam/cpu"):
            advice = 'torch.optim.AdamW takes it: add "torch_adam": true'
            elsewhere |= dict.fromkeys(("foreach", "fused", "maximize", "capturable"), advice)
        makers = {"adam/fused": "DeepSpeed's fused ", "adam/cpu": "DeepSpeed's CPU ", "adam/torch": "torch's "}
        owner = f"{makers.get(variant(s), '')}{s.v.optimizer.type}"
        _check_arguments(s, "optimizer", owner, elsewhere)
    if _is_built(s, "scheduler", tuple(schema.SCHEDULER_PARAMS), REFUSED_SCHEDULERS, "chatgot.schedule"):
        kind = str(s.v.scheduler.type)
        if s.tree["scheduler"].get("params") is None:
            why = f"must be given, DeepSpeed fails without it; {{}} for {kind}'s own defaults"
            s.findings.error("scheduler.params", ABSENT, why)
        else:
            _check_arguments(s, "scheduler", kind, {})


def _is_built(s: Subject, section: str, names: tuple[str, ...], refused: dict[str, str], instead: str) -> bool:
    """Whether DeepSpeed can build what a section asks for; else it is noted, unless there is no type at all."""
    key, kind = f"{section}.type", s.v[f"{section}.type"]
    if not isinstance(kind, str):
        return False
    if why := refused.get(kind) or refused.get(kind.lower()):
        s.findings.error(key, kind, f"{why}; use {instead}")
    elif not known_arguments(s, section):
        why, allowed = f"unknown {section}, DeepSpeed fails when it builds it", "one of " + ", ".join(names)
        s.findings.error(key, kind, why, allowed=allowed, suggestion=meant(kind, names))
    else:
        return True
    return False


def _check_arguments(s: Subject, section: str, owner: str, elsewhere: dict[str, str]) -> None:
    """Check what a constructor is given; `elsewhere` says for an argument of another one what makes it known."""
    params, known = s.params(section), known_arguments(s, section)
    for key, value in params.items():
        place = f"{section}.params.{key}"
        if key in known:
            try:
                known[key].read(value, False)
            except (ValueError, OverflowError):
                note_wrong(place, value, known[key], False, s.findings)
            continue
        advice = elsewhere.get(key, "")
        why = f"{owner} has no such argument, and its constructor fails" + (f"; {advice}" if advice else "")
        suggestion = "lr" if key == "learning_rate" else "" if advice else meant(key, known)
        s.findings.error(place, value, why, allowed="one of " + ", ".join(known), suggestion=suggestion)
    for key, node in known.items():
        if node.required and key not in params:
            s.findings.error(f"{section}.params.{key}", ABSENT, f"must be given for {owner}: {node.allowed()}")


def _is_untested(s: Subject) -> bool:
    kind = s.v.optimizer.type
    built = s.optimizer in DEEPSPEED_OPTIMIZERS or kind in TORCH_OPTIMIZERS
    return built and not {s.optimizer, kind} & {*REFUSED_OPTIMIZERS, *ZERO_TESTED_OPTIMIZERS}


def _has_bf16_optimizer(s: Subject) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer, which clips raw gradients before Muon sees them."""
    return s.stage == 1 and s.v.bf16.enabled is True and s.v.data_types.grad_accum_dtype in schema.FP32_NAMES


def has_one_group(stage: int, optimizer: str, offloaded: bool) -> bool:
    """Whether all parameters must be in one group: ZeRO makes torch's Adagrad anew, of a flat list (zero/stage3.py and
    zero/stage_1_and_2.py, initialize_optimizer_states).
    """
    return stage > 0 and optimizer.lower() == "adagrad" and not offloaded


def _no_lr(s: Subject) -> dict[str, str] | None:
    if not s.optimizer or {"lr", "muon_lr", "adam_lr"} & set(s.arguments):
        return None
    node = known_arguments(s, "optimizer").get("lr")
    return {"lr": f"{node.default:g}" if node is not None and node.default else "the optimizer's own"}


# fmt: off
RULES: tuple[Rule, ...] = (
    error("optimizer.type", lambda s, _: s.stage > 0 and not s.v.zero_allow_untested_optimizer and _is_untested(s),
          "DeepSpeed did not test it with ZeRO; add zero_allow_untested_optimizer = true to use it"),
    error("optimizer.type", lambda s, _: s.optimizer in CUDA_OPTIMIZERS and variant(s) != "lion/cpu"
          and s.facts.kind == "cpu", "its kernel exists for CUDA only; use AdamW", device=True),
    error("optimizer.type", lambda s, _: s.optimizer == "lamb" and s.offloaded, "its kernel cannot step on offloaded "
          "state; use AdamW, or zero_optimization.offload_optimizer.device = none"),
    error("fp16.loss_scale", lambda s, scale: s.optimizer == "lamb" and scale != 0,
          "lamb needs dynamic loss scaling; set 0"),
    error("optimizer.params.amsgrad", lambda s, _: variant(s) in ("adam/fused", "adam/cpu")
          and s.arguments.get("amsgrad") is True and {"value": True},
          'DeepSpeed\'s Adam does not have it; add "torch_adam": true'),
    error(" ".join(_CPU_ADAM_ONLY), lambda s, value: _is_asked(value) and s.offloaded and s.stage and s.optimizer
          and variant(s) != "adam/cpu", "DeepSpeed takes its CPUAdam only for it: optimizer.type must be AdamW or "
          "Adam, without torch_adam"),
    error("optimizer.params.adam_w_mode", lambda s, _: s.optimizer == "adam" and s.stage == 3 and s.offloaded
          and s.arguments.get("adam_w_mode") is False and any(_is_asked(s.v[key]) for key in _CPU_ADAM_ONLY[:2])
          and {"value": False}, "DeepSpeed steps a part of the weights with AdamW where offload_optimizer.ratio is "
          "below 1 or super_offload is on; delete it, or them", "zero/stage3.py, superoffload/superoffload_utils.py"),
    warning(f"{_OFFLOAD}.super_offload", lambda s, on: on and s.stage == 3,
            "keeps the optimizer's state in a process of its own, which no checkpoint reaches: a resumed run starts "
            "with a new state", "superoffload/superoffload_utils.py"),
    error("optimizer.params.foreach", lambda s, _: variant(s) == "adam/torch" and s.arguments.get("fused")
          and s.arguments.get("foreach") and {"value": True}, "torch takes fused or foreach, not both"),
    error("optimizer.params.adam_w_mode", lambda s, _: s.optimizer == "adamw"
          and s.arguments.get("adam_w_mode") is False and {"value": False},
          'DeepSpeed ignores it for AdamW; set optimizer.type = "Adam"'),
    error("optimizer.type", lambda s, _: s.optimizer == "muon" and s.stage == 3
          and s.v.zero_optimization.reduce_scatter,
          "Muon at ZeRO stage 3 needs zero_optimization.reduce_scatter = false", "zero/stage3.py"),
    error("optimizer.type", lambda s, _: s.optimizer == "muon" and s.offloaded, "Muon does not work with optimizer "
          "offload; use AdamW, or zero_optimization.offload_optimizer.device = none"),
    error("optimizer.params.per_head_muon", lambda s, _: s.optimizer == "muon" and s.arguments.get("per_head_muon")
          and {"value": True}, "needs a transformers model; delete it"),
    adapted("optimizer.type", lambda s, _: s.optimizer == "muon" and s.v.gradient_clipping > 0
            and not _has_bf16_optimizer(s) and {"stock": "the updates too, which stops it from learning" if s.stage
                                                else "all gradients, by the norm of all"},
            "gradient_clipping is for the AdamW groups only, by their own norm, which optim/grad_norm then is: Muon's "
            "orthogonalised updates have a fixed size. Stock DeepSpeed would clip {stock}"),
    note("optimizer.type", lambda s, _: s.optimizer == "adagrad" and has_one_group(s.stage, "adagrad", s.offloaded),
         "DeepSpeed's ZeRO fails on two parameter groups of Adagrad: weight decay reaches biases and norms too"),
    note("optimizer.type", lambda s, _: s.optimizer == "adam" and "adam_w_mode" not in s.arguments,
         "DeepSpeed means AdamW by it (decoupled weight decay) unless adam_w_mode is false"),
    note("optimizer.params.lr", lambda s, _: _no_lr(s), "is not stated: the default is {lr}", absent=True),
    error("scheduler", lambda s, on: on and s.chatgot.schedule is not None and {"value": s.tree["scheduler"]},
          "chatgot.schedule stands here too, and both would move the lr; keep one of them"),
    error("scheduler.type", lambda s, kind: s.stage > 0 and kind in schema.SCHEDULER_PARAMS
          and kind not in DEEPSPEED_SCHEDULERS, "torch's schedulers fail on ZeRO's optimizers, which are none of "
          "torch's; use chatgot.schedule, or WarmupDecayLR or another one of DeepSpeed's"),
    warning("scheduler.type", lambda s, kind: kind in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
            and {"peak": " and never reaches the peak" if kind == "WarmupCosineLR" else ""},
            "spends its first two steps at a learning rate of 0{peak} (measured with 0.19.8); chatgot.schedule "
            "does neither"),
)
"""The rows of rules.RULES about optimizers and schedulers."""
# fmt: on


@dataclass(frozen=True)
class OptimizerStates:
    """State of one tensor, in the dtype of that tensor (with ZeRO a flat fp32 partition) unless stated otherwise."""

    tensors: int
    """Shaped like the tensor that is stepped."""
    scalars: int = 1
    """fp32 tensors of one element; a counter that is a Python number is none."""
    factored: bool = False
    """Of a tensor with several dimensions only sums over its last two are kept, not a tensor of its shape."""

    def elements(self, shape: tuple[int, ...]) -> int:
        """Elements that are kept for a tensor of this shape, scalars left out."""
        if self.factored and len(shape) > 1:
            return prod(shape[:-1]) + prod(shape[:-2]) * shape[-1]
        return self.tensors * prod(shape)


_STATES: dict[str, OptimizerStates] = {
    "adam": OptimizerStates(2),
    "adamw": OptimizerStates(2),
    "fusedadam": OptimizerStates(2, scalars=0),
    "deepspeedcpuadam": OptimizerStates(2, scalars=0),
    "zenflowcpuadam": OptimizerStates(2, scalars=0),
    "lamb": OptimizerStates(2, scalars=0),
    "fusedlamb": OptimizerStates(2, scalars=0),
    "lion": OptimizerStates(1, scalars=0),
    "fusedlion": OptimizerStates(1, scalars=0),
    "deepspeedcpulion": OptimizerStates(2, scalars=0),  # the second one is made and never used (cpu_lion.py)
    "adagrad": OptimizerStates(1),
    "deepspeedcpuadagrad": OptimizerStates(1, scalars=0),
    "muon": OptimizerStates(2),
    "muonwithauxadam": OptimizerStates(2),
    "adadelta": OptimizerStates(2),
    "adafactor": OptimizerStates(1, factored=True),
    "adamax": OptimizerStates(2),
    "asgd": OptimizerStates(1, scalars=3),
    "nadam": OptimizerStates(2, scalars=2),
    "radam": OptimizerStates(2),
    "rmsprop": OptimizerStates(1),
    "rprop": OptimizerStates(2),
    "sgd": OptimizerStates(0, scalars=0),
}
"""By the JSON's `optimizer.type`, or the class, in lower case. "muon" is its Adam half. Held against the optimizers of
torch and DeepSpeed 0.19.8 themselves.
"""


def optimizer_states(optimizer: str, arguments: Mapping[str, Any], offloaded: bool = False) -> OptimizerStates:
    """What an optimizer keeps for each tensor.

    Args:
        optimizer: the JSON's `optimizer.type`, or the name of the class that was built.
        arguments: `optimizer.params`, or a parameter group; `use_muon` marks a group that Muon orthogonalises.
        offloaded: the JSON's type is stepped on the CPU, for which DeepSpeed may have another class.

    Raises:
        KeyError: no such optimizer (the JSON with it is refused).
    """
    name = optimizer.lower()
    if offloaded and name in ("lion", "adagrad"):
        name = f"deepspeedcpu{name}"
    if name.startswith("muon") and arguments.get("use_muon"):
        return OptimizerStates(1, scalars=0)
    if name in ("adam", "adamw") and arguments.get("torch_adam") is False:
        name = "fusedadam"
    states = _STATES[name]
    more = 0
    if name in ("sgd", "rmsprop"):
        more = int(bool(arguments.get("momentum"))) + int(name == "rmsprop" and bool(arguments.get("centered")))
    elif name in ("adam", "adamw"):  # DeepSpeed's own have no amsgrad
        more = int(bool(arguments.get("amsgrad")))
    return OptimizerStates(states.tensors + more, states.scalars, states.factored)
