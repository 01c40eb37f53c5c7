"""The batch equation: train_batch_size = micro batch x accumulation x ranks. Two numbers give the third."""

from __future__ import annotations

from dataclasses import dataclass

from chatgot.deepspeed_json.findings import ABSENT, Findings
from chatgot.deepspeed_json.values import Derivations, Values

TOTAL = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
_OPEN = (1, "found by real steps at the first start; 1 stands for it until then")
_LARGEST_ADVISED = 4096


@dataclass(frozen=True)
class Batch:
    """What an optimizer step is made of."""

    total: int
    """Samples over all ranks."""
    micro: int
    """Samples per rank and forward pass."""
    accumulation: int
    """Forward passes."""
    is_open: bool = False
    """Whether memory decides the micro-batch ("auto", and the other two numbers do not determine it)."""


def resolve_batch(
    values: Values, world_size: int, findings: Findings, derived: Derivations, known_micro: tuple[int, str] = _OPEN
) -> Batch | None:
    """The three batch numbers as DeepSpeed derives them (runtime/config.py, _set_batch_related_parameters), but never
    rounded.

    Args:
        known_micro: a micro-batch that memory allows, and why, for an open one; by default 1 stands for it.

    Returns None after an error was found: too few numbers, or numbers that do not fit `world_size` (with three
    corrections that do).
    """
    given = {name: values[name] for name in (TOTAL, MICRO, ACCUMULATION)}
    if any(name in values.spelled and name not in values.given for name in given):
        return None  # mistyped, already noted
    known = {name: value for name, value in given.items() if isinstance(value, int)}
    is_open = given[MICRO] == "auto" and known.keys() == {TOTAL}
    if is_open:
        known[MICRO], given[MICRO], given[ACCUMULATION] = known_micro[0], known_micro[0], None
        derived.add(MICRO, known_micro[0], f'"auto", {known_micro[1]}')
    autos = [name for name, value in given.items() if value == "auto"]
    if (autos and len(known) < 2) or not known.keys() & {TOTAL, MICRO}:
        name = autos[0] if autos else TOTAL
        example = f"for example {TOTAL} and {MICRO}; the third is derived"
        why = f"give two of {TOTAL}, {MICRO} and {ACCUMULATION} as numbers, {example}"
        findings.error(name, "auto" if autos else ABSENT, why)
        return None
    total, micro, accumulation = (known.get(name) for name in (TOTAL, MICRO, ACCUMULATION))
    if total is not None and micro is None and accumulation is None:
        accumulation = 1
    if micro is not None and total is None:
        accumulation = accumulation or 1
        total = micro * accumulation * world_size
    elif micro is None and total is not None and accumulation is not None:
        micro = total // (accumulation * world_size)
    elif accumulation is None and total is not None and micro is not None:
        accumulation = total // (micro * world_size)
    assert total is not None and micro is not None and accumulation is not None  # noqa: PT018
    ranks = _ranks(world_size)
    if total != micro * accumulation * world_size:
        factors = [f"{name} {known[name]}" for name in (MICRO, ACCUMULATION) if name in known]
        product = known.get(MICRO, 1) * known.get(ACCUMULATION, 1) * world_size
        relation = "equal" if len(factors) == 2 else "be a multiple of"
        options = " or ".join(map(_option, corrections(known, world_size)))
        why = f"must {relation} {' x '.join([*factors, ranks])} = {product}, DeepSpeed stops otherwise"
        findings.error(TOTAL, total, why, allowed=options)
        return None
    equation = f"{micro} per rank x {accumulation} accumulation x {ranks}"
    if TOTAL not in known:
        changes = "; it changes with the number of ranks, state train_batch_size to keep it"
        derived.add(TOTAL, total, equation + ("" if ACCUMULATION in known else changes))
    if MICRO not in known:
        derived.add(MICRO, micro, f"{total} samples / {accumulation} accumulation / {ranks}")
    if ACCUMULATION not in known:
        derived.add(ACCUMULATION, accumulation, f"{total} samples / {micro} per rank / {ranks}")
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


def _option(change: dict[str, int]) -> str:
    return " with ".join(f"{name} = {value}" for name, value in change.items())


def _nearest_divisors(number: int, wished: int) -> list[int]:
    """Up to three divisors of `number` next to `wished`, in order; none of 0."""
    divisors = [n for n in range(1, min(number, _LARGEST_ADVISED) + 1) if number % n == 0]
    return sorted(sorted(divisors, key=lambda n: (abs(n - wished), n))[:3])


def _ranks(world_size: int) -> str:
    return f"{world_size} rank" if world_size == 1 else f"{world_size} ranks"
