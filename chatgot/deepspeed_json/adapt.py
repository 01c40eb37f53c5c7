"""Run a JSON differently from the letter where the letter would fail or train wrongly, and say how: every "auto" gets a
value, a missing optimizer is the shipped one, 16 bit without ZeRO runs at stage 1.

Whatever changes goes three ways: into the values that the rules see, into what DeepSpeed gets, and into a finding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from chatgot.deepspeed_json.batch import ACCUMULATION, MICRO, TOTAL
from chatgot.deepspeed_json.findings import ABSENT, Findings
from chatgot.deepspeed_json.optimizers import ELEMENTWISE_OPTIMIZERS, cpu_adam_key, known_arguments
from chatgot.deepspeed_json.read import default_json, read_document, shipped_jsons
from chatgot.deepspeed_json.schema import NODES
from chatgot.deepspeed_json.values import Derivations, Values, given_arguments
from chatgot.devices import DeviceFacts

_STAGE = "zero_optimization.stage"
_OFFLOADS = {
    "zero_optimization.offload_optimizer.device": (1, "none"),
    "zero_optimization.cpu_offload": (1, False),
    "zero_optimization.offload_param.device": (3, "none"),
    "zero_optimization.cpu_offload_param": (3, False),
}
"""Key -> the first ZeRO stage that reads it, and the value without it."""
ADAPTED = {
    "optimizer": 'is not given: it trains with that of {shipped}; to state it, paste "optimizer": {section}',
    _STAGE: "{precision} runs at ZeRO stage 1, also on one rank: at stage 0 DeepSpeed steps once before training "
    "begins",
    **dict.fromkeys(_OFFLOADS, "is not passed on: it works from ZeRO stage {first} on, and the stage is {stage}"),
    "checkpoint.load_universal": "is not passed on: a resume takes any checkpoint to any ranks, stage and precision "
    "without it",
    "data_efficiency.enabled": "is not passed on: DeepSpeed drops tokens (random_ltd) only in layers that a program "
    "wraps itself, and ChatGoT wraps none",
    "compile.deepcompile": "is not passed on where the device is a CPU, for which DeepCompile is not made",
}
"""Key -> what is run in place of it, as the rules in rules.py say it of the others."""
RUN_LENGTH = "scheduler.params.total_num_steps"


@dataclass(frozen=True)
class Adaptation:
    """What is known while a JSON is adapted."""

    values: Values
    tree: dict[str, Any]
    """The JSON with overrides; optimizer and scheduler arguments are filled in here."""
    facts: DeviceFacts
    ranks: int
    findings: Findings
    derived: Derivations

    def run(self) -> None:
        """Adapt what is to be adapted, in the order in which one thing follows from another."""
        self._choose_precision()
        for dotted in self.values.autos:  # DeepSpeed drops it and takes its default; clipping, not dropped, alike
            self.derived.add(dotted, NODES[dotted].default, '"auto", DeepSpeed\'s default')
        self._fill_batch()
        self._give_optimizer()
        self._fill_arguments("optimizer")
        self._fill_arguments("scheduler")
        self._drop_offload_below_its_stage()
        self._raise_stage()
        off = ["checkpoint.load_universal", "data_efficiency.enabled"]
        off += ["compile.deepcompile"] if self.facts.kind == "cpu" else []
        for dotted in off:
            if self.values[dotted]:
                self._instead(dotted, True, False)

    @cached_property
    def _shipped(self) -> tuple[str, dict[str, Any]]:
        """The shipped JSON with AdamW that this device would take: its name and content."""
        path = shipped_jsons()["fp32_zero0"] if self.facts.kind == "cpu" else default_json(self.facts, self.ranks)
        return path.name, read_document(path).tree

    def _instead(self, dotted: str, stated: Any, value: Any, **filled: Any) -> None:
        """Use another value than the one that stands there, and say so."""
        name, why = self.values.name(dotted), ADAPTED[dotted].format(**filled)
        self.findings.add("adapted", name, stated, why)
        self.values[dotted] = value
        self.derived.add(dotted, value, why)

    def _choose_precision(self) -> None:
        """bf16.enabled and fp16.enabled "auto": bf16 where it is supported, else fp16, else neither."""
        values, facts = self.values, self.facts
        auto = [name for name in ("bf16", "fp16") if values[f"{name}.enabled"] == "auto"]
        device, supported = facts.name or facts.kind, {"bf16": facts.bf16, "fp16": facts.fp16}
        taken = next((key for key in ("torch_autocast", "bf16", "fp16") if values[f"{key}.enabled"] is True), None)
        chosen = None if taken else next((name for name in auto if supported[name]), None)
        for name in auto:
            if taken:
                reason = f"{taken}.enabled is true"
            elif chosen:
                reason = f"{device} supports {chosen}"
            else:
                reason = f"{device} does not support {name}; training in fp32"
            values[f"{name}.enabled"] = name == chosen
            self.derived.add(f"{name}.enabled", name == chosen, f'"auto", {reason}')

    def _fill_batch(self) -> None:
        """Batch numbers that are "auto" and follow from no other; a micro-batch that memory decides stays open."""
        values, given = self.values, {name: self.values[name] for name in (TOTAL, MICRO, ACCUMULATION)}
        if "auto" not in given.values() or (isinstance(given[TOTAL], int) and given[MICRO] is not None):
            return
        name, shipped = self._shipped
        found, reason = {ACCUMULATION: 1}, "1, DeepSpeed's default"
        if not isinstance(given[TOTAL], int):
            micro = given[MICRO] if isinstance(given[MICRO], int) else shipped[MICRO]
            accumulation, rest = divmod(shipped[TOTAL], micro * self.ranks)
            found = {MICRO: micro, ACCUMULATION: 1 if rest else accumulation}
            reason = reason if rest else f"{accumulation}, for {shipped[TOTAL]} samples a step as in {name}"
        for dotted, value in found.items():
            if not isinstance(given[dotted], int):
                why = reason if dotted == ACCUMULATION else f"{value}, as in {name}"
                values[dotted] = value
                self.derived.add(dotted, value, why.partition(", ")[2])
                self.findings.add("adapted", dotted, given[dotted] or ABSENT, why)

    def _give_optimizer(self) -> None:
        if "optimizer" in self.tree or any(one.suggestion == "optimizer" for one in self.findings.all):
            return
        name, shipped = self._shipped
        section = shipped["optimizer"]
        self.values["optimizer"], self.values["optimizer.type"] = True, section["type"]
        of_deepspeed = {key: value for key, value in section["params"].items() if key not in ("torch_adam", "fused")}
        if cpu_adam_key(self.values, {"optimizer": {"params": of_deepspeed}}):
            section = {**section, "params": of_deepspeed}
        self.tree["optimizer"] = {**section, "params": dict(section["params"])}
        self.values["optimizer.params"] = True
        reason = f"not given, as in {name}"
        self.derived.add("optimizer.type", section["type"], reason)
        for key, value in section["params"].items():
            self.derived.add(f"optimizer.params.{key}", value, reason)
        why = ADAPTED["optimizer"].format(shipped=name, section=json.dumps(section))
        self.findings.add("adapted", "optimizer", ABSENT, why)

    def _fill_arguments(self, section: str) -> None:
        """Arguments of the optimizer or scheduler that are "auto"."""
        params, known = given_arguments(self.tree, section), known_arguments(self.values, self.tree, section)
        if "auto" not in params.values():
            return
        name, shipped = self._shipped
        theirs: dict[str, tuple[Any, str]] = {}
        if section == "scheduler":
            lr = given_arguments(self.tree, "optimizer").get("lr")
            theirs["warmup_num_steps"] = shipped["chatgot"]["schedule"]["warmup_steps"], f"as in {name}"
            theirs["warmup_min_lr"] = 0.0, "DeepSpeed's default"
            theirs["total_num_steps"] = 10_000, "until the length of the run is known"
            theirs |= {"warmup_max_lr": (lr, "the optimizer's lr")} if lr is not None else {}
        elif str(self.values.optimizer.type).lower() in ("adam", "adamw"):
            theirs = {key: (value, f"as in {name}") for key, value in shipped["optimizer"]["params"].items()}
        for key in [key for key, value in params.items() if value == "auto" and key in known]:
            value, source = theirs.get(key) or (known[key].default, f"the default of {self.values[f'{section}.type']}")
            if value is None:
                continue  # nothing to take: refused like any other value of the wrong type
            params[key] = value
            dotted = f"{section}.params.{key}"
            self.derived.add(dotted, value, f'"auto", {source}')
            self.findings.add("adapted", dotted, "auto", f"{json.dumps(value)}, {source}")

    def _drop_offload_below_its_stage(self) -> None:
        stage = self.values.zero_optimization.stage
        for dotted, (first, off) in _OFFLOADS.items():
            if self.values[dotted] not in (None, off) and stage < first:
                self._instead(dotted, self.values[dotted], off, first=first, stage=stage)

    def _raise_stage(self) -> None:
        """16 bit at stage 0: DeepSpeed takes an optimizer step with zero gradients before training begins
        (fp16/unfused_optimizer.py and fused_optimizer.py, when the wrapper of stage 0 starts).
        """
        values = self.values
        name = next((name for name in ("bf16", "fp16") if values[f"{name}.enabled"] is True), None)
        if name is None or values.zero_optimization.stage != 0:
            return
        self._instead(_STAGE, 0 if _STAGE in values else ABSENT, 1, precision=name)
        if str(values.optimizer.type).lower() in ELEMENTWISE_OPTIMIZERS and not values.zero_allow_untested_optimizer:
            self.values["zero_allow_untested_optimizer"] = True
            self.derived.add("zero_allow_untested_optimizer", True, "the stage is 1 because of 16 bit")
