"""Fill a JSON in, and run it differently from the letter where the letter would fail or train wrongly: every "auto"
gets a value, two batch numbers give the third, a missing optimizer is the shipped one, 16 bit runs at stage 1.

Whatever changes goes three ways: into the values that the rules see, into what DeepSpeed gets, and into a finding.
"""

from __future__ import annotations

import json
from typing import Any

from chatgot.deepspeed_json.findings import ABSENT
from chatgot.deepspeed_json.optimizers import ELEMENTWISE_OPTIMIZERS, cpu_adam_key, known_arguments
from chatgot.deepspeed_json.read import default_json, read_document, shipped_jsons
from chatgot.deepspeed_json.rule_types import Batch, Subject
from chatgot.deepspeed_json.schema import ACCUMULATION, MICRO, NODES, TOTAL

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
_OPEN = (1, "found by real steps at the first start; 1 stands for it until then")
_LARGEST_ADVISED = 4096


def adapt(s: Subject) -> None:
    """Adapt what is to be adapted, in the order in which one thing follows from another."""
    _choose_precision(s)
    for dotted in s.v.autos:  # DeepSpeed drops it and takes its default; clipping, not dropped, alike
        s.derive(dotted, NODES[dotted].default, '"auto", DeepSpeed\'s default')
    _fill_batch(s)
    _give_optimizer(s)
    _fill_arguments(s, "optimizer")
    _fill_arguments(s, "scheduler")
    for dotted, (first, off) in _OFFLOADS.items():
        if s.v[dotted] not in (None, off) and s.stage < first:
            _instead(s, dotted, s.v[dotted], off, first=first, stage=s.stage)
    _raise_stage(s)
    off = ["checkpoint.load_universal", "data_efficiency.enabled"]
    off += ["compile.deepcompile"] if s.facts.kind == "cpu" else []
    for dotted in off:
        if s.v[dotted]:
            _instead(s, dotted, True, False)
    if s.v.compile.deepcompile and "enabled" not in s.chatgot.compile.model_fields_set:
        s.derive("chatgot.compile.enabled", True, "compile.deepcompile needs it")
        compiled = s.chatgot.compile.model_copy(update={"enabled": True})
        s.chatgot = s.chatgot.model_copy(update={"compile": compiled})


def _shipped(s: Subject) -> tuple[str, dict[str, Any]]:
    """The shipped JSON with AdamW that this device would take: its name and content."""
    path = shipped_jsons()["fp32_zero0"] if s.facts.kind == "cpu" else default_json(s.facts, s.ranks)
    return path.name, read_document(path).tree


def _instead(s: Subject, dotted: str, stated: Any, value: Any, **filled: Any) -> None:
    """Use another value than the one that stands there, and say so."""
    why = ADAPTED[dotted].format(**filled)
    s.findings.add("adapted", s.v.name(dotted), stated, why)
    s.v[dotted] = value
    s.derive(dotted, value, why)


def _choose_precision(s: Subject) -> None:
    """bf16.enabled and fp16.enabled "auto": bf16 where it is supported, else fp16, else neither."""
    auto = [name for name in ("bf16", "fp16") if s.v[f"{name}.enabled"] == "auto"]
    taken = next((key for key in ("torch_autocast", "bf16", "fp16") if s.v[f"{key}.enabled"] is True), None)
    chosen = None if taken else next((name for name in auto if getattr(s.facts, name)), None)
    for name in auto:
        if taken:
            reason = f"{taken}.enabled is true"
        elif chosen:
            reason = f"{s.device} supports {chosen}"
        else:
            reason = f"{s.device} does not support {name}; training in fp32"
        s.v[f"{name}.enabled"] = name == chosen
        s.derive(f"{name}.enabled", name == chosen, f'"auto", {reason}')


def _fill_batch(s: Subject) -> None:
    """Batch numbers that are "auto" and follow from no other; a micro-batch that memory decides stays open."""
    given = {name: s.v[name] for name in (TOTAL, MICRO, ACCUMULATION)}
    if "auto" not in given.values() or (isinstance(given[TOTAL], int) and given[MICRO] is not None):
        return
    name, shipped = _shipped(s)
    found, reason = {ACCUMULATION: 1}, "1, DeepSpeed's default"
    if not isinstance(given[TOTAL], int):
        micro = given[MICRO] if isinstance(given[MICRO], int) else shipped[MICRO]
        accumulation, rest = divmod(shipped[TOTAL], micro * s.ranks)
        found = {MICRO: micro, ACCUMULATION: 1 if rest else accumulation}
        reason = reason if rest else f"{accumulation}, for {shipped[TOTAL]} samples a step as in {name}"
    for dotted, value in found.items():
        if not isinstance(given[dotted], int):
            why = reason if dotted == ACCUMULATION else f"{value}, as in {name}"
            s.v[dotted] = value
            s.derive(dotted, value, why.partition(", ")[2])
            s.findings.add("adapted", dotted, given[dotted] or ABSENT, why)


def _give_optimizer(s: Subject) -> None:
    if "optimizer" in s.tree or not s.is_unstated("optimizer"):
        return
    name, shipped = _shipped(s)
    section = shipped["optimizer"]
    s.v["optimizer"], s.v["optimizer.type"] = True, section["type"]
    of_deepspeed = {key: value for key, value in section["params"].items() if key not in ("torch_adam", "fused")}
    if cpu_adam_key(s, of_deepspeed):
        section = {**section, "params": of_deepspeed}
    s.tree["optimizer"] = {**section, "params": dict(section["params"])}
    s.v["optimizer.params"] = True
    reason = f"not given, as in {name}"
    s.derive("optimizer.type", section["type"], reason)
    for key, value in section["params"].items():
        s.derive(f"optimizer.params.{key}", value, reason)
    why = ADAPTED["optimizer"].format(shipped=name, section=json.dumps(section))
    s.findings.add("adapted", "optimizer", ABSENT, why)


def _fill_arguments(s: Subject, section: str) -> None:
    """Arguments of the optimizer or scheduler that are "auto"."""
    params, known = s.params(section), known_arguments(s, section)
    if "auto" not in params.values():
        return
    name, shipped = _shipped(s)
    theirs: dict[str, tuple[Any, str]] = {}
    if section == "scheduler":
        lr = s.arguments.get("lr")
        theirs["warmup_num_steps"] = shipped["chatgot"]["schedule"]["warmup_steps"], f"as in {name}"
        theirs["warmup_min_lr"] = 0.0, "DeepSpeed's default"
        theirs["total_num_steps"] = 10_000, "until the length of the run is known"
        theirs |= {"warmup_max_lr": (lr, "the optimizer's lr")} if lr is not None else {}
    elif s.optimizer in ("adam", "adamw"):
        theirs = {key: (value, f"as in {name}") for key, value in shipped["optimizer"]["params"].items()}
    for key in [key for key, value in params.items() if value == "auto" and key in known]:
        value, source = theirs.get(key) or (known[key].default, f"the default of {s.v[f'{section}.type']}")
        if value is None:
            continue  # nothing to take: refused like any other value of the wrong type
        params[key] = value
        dotted = f"{section}.params.{key}"
        s.derive(dotted, value, f'"auto", {source}')
        s.findings.add("adapted", dotted, "auto", f"{json.dumps(value)}, {source}")


def _raise_stage(s: Subject) -> None:
    """16 bit at stage 0: DeepSpeed takes an optimizer step with zero gradients before training begins
    (fp16/unfused_optimizer.py and fused_optimizer.py, when the wrapper of stage 0 starts).
    """
    name = next((name for name in ("bf16", "fp16") if s.v[f"{name}.enabled"] is True), None)
    if name is None or s.stage != 0:
        return
    _instead(s, _STAGE, 0 if _STAGE in s.v else ABSENT, 1, precision=name)
    if s.optimizer in ELEMENTWISE_OPTIMIZERS and not s.v.zero_allow_untested_optimizer:
        s.v["zero_allow_untested_optimizer"] = True
        s.derive("zero_allow_untested_optimizer", True, "the stage is 1 because of 16 bit")


def resolve_batch(s: Subject, known_micro: tuple[int, str] = _OPEN) -> Batch | None:
    """The batch equation, train_batch_size = micro batch x accumulation x ranks: two numbers give the third, as
    DeepSpeed derives it (runtime/config.py, _set_batch_related_parameters), but never rounded.

    Args:
        known_micro: a micro-batch that memory allows, and why, for an open one; by default 1 stands for it.

    Returns None after an error was found: too few numbers, or numbers that do not fit the ranks (with three corrections
    that do).
    """
    given = {name: s.v[name] for name in (TOTAL, MICRO, ACCUMULATION)}
    if any(name in s.v.spelled and name not in s.v.given for name in given):
        return None  # mistyped, already noted
    known = {name: value for name, value in given.items() if isinstance(value, int)}
    is_open = given[MICRO] == "auto" and known.keys() == {TOTAL}
    if is_open:
        known[MICRO], given[MICRO], given[ACCUMULATION] = known_micro[0], known_micro[0], None
        s.derive(MICRO, known_micro[0], f'"auto", {known_micro[1]}')
    autos = [name for name, value in given.items() if value == "auto"]
    if (autos and len(known) < 2) or not known.keys() & {TOTAL, MICRO}:
        name = autos[0] if autos else TOTAL
        example = f"for example {TOTAL} and {MICRO}; the third is derived"
        why = f"give two of {TOTAL}, {MICRO} and {ACCUMULATION} as numbers, {example}"
        s.findings.error(name, "auto" if autos else ABSENT, why)
        return None
    full = dict(known)
    if len(known) == 1 or TOTAL not in known:
        full.setdefault(ACCUMULATION, 1)
    if TOTAL not in full:
        full[TOTAL] = full[MICRO] * full[ACCUMULATION] * s.ranks
    for name, other in ((MICRO, ACCUMULATION), (ACCUMULATION, MICRO)):
        if name not in full:
            full[name] = full[TOTAL] // (full[other] * s.ranks)
    total, micro, accumulation = full[TOTAL], full[MICRO], full[ACCUMULATION]
    ranks = f"{s.ranks} rank" if s.ranks == 1 else f"{s.ranks} ranks"
    if total != micro * accumulation * s.ranks:
        factors = [f"{name} {known[name]}" for name in (MICRO, ACCUMULATION) if name in known]
        product = known.get(MICRO, 1) * known.get(ACCUMULATION, 1) * s.ranks
        relation = "equal" if len(factors) == 2 else "be a multiple of"
        changes = corrections(known, s.ranks)
        options = [" with ".join(f"{name} = {value}" for name, value in change.items()) for change in changes]
        why = f"must {relation} {' x '.join([*factors, ranks])} = {product}, DeepSpeed stops otherwise"
        s.findings.error(TOTAL, total, why, allowed=" or ".join(options))
        return None
    if TOTAL not in known:
        changes = "; it changes with the number of ranks, state train_batch_size to keep it"
        equation = f"{micro} per rank x {accumulation} accumulation x {ranks}"
        s.derive(TOTAL, total, equation + ("" if ACCUMULATION in known else changes))
    if MICRO not in known:
        s.derive(MICRO, micro, f"{total} samples / {accumulation} accumulation / {ranks}")
    if ACCUMULATION not in known:
        s.derive(ACCUMULATION, accumulation, f"{total} samples / {micro} per rank / {ranks}")
    return Batch(total, micro, accumulation, is_open)


def corrections(known: dict[str, int], world_size: int) -> list[dict[str, int]]:
    """Three or more changes, each of which makes the numbers fit; those that change one number come first."""
    total, micro, accumulation = known[TOTAL], known.get(MICRO), known.get(ACCUMULATION)
    step = (micro or 1) * (accumulation or 1) * world_size
    per_rank = total // world_size if total % world_size == 0 else 0  # samples; 0: it cannot be shared out evenly
    if not (micro and accumulation):
        options = [{TOTAL: n} for n in (total // step * step, (total // step + 1) * step) if n]
        name, wished = (MICRO, micro) if micro else (ACCUMULATION, accumulation)
        if wished:
            options += [{name: n} for n in _nearest_divisors(per_rank, wished)]
        nearest = [{TOTAL: n} for n in (total // step * step + 2 * step, total // step * step + 3 * step)]
        return options + nearest[: max(0, 3 - len(options))]
    options = [{TOTAL: step}]
    if per_rank and per_rank % accumulation == 0:
        options.append({MICRO: per_rank // accumulation})
    if per_rank and per_rank % micro == 0:
        options.append({ACCUMULATION: per_rank // micro})
    pairs = [{MICRO: n, ACCUMULATION: per_rank // n} for n in _nearest_divisors(per_rank, micro)]
    pairs += [
        {TOTAL: micro * n * world_size, ACCUMULATION: n}
        for n in (accumulation - 1, accumulation + 1, accumulation + 2)
        if n
    ]
    pairs = [pair for pair in pairs if not any(set(single.items()) <= set(pair.items()) for single in options)]
    return options + pairs[: max(0, 3 - len(options))]


def _nearest_divisors(number: int, wished: int) -> list[int]:
    """Up to three divisors of `number` next to `wished`, in order; none of 0."""
    divisors = [n for n in range(1, min(number, _LARGEST_ADVISED) + 1) if number % n == 0]
    return sorted(sorted(divisors, key=lambda n: (abs(n - wished), n))[:3])
