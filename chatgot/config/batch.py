"""The batch equation: train_batch_size = micro batch x accumulation x ranks. Two numbers give the third."""

from __future__ import annotations

from dataclasses import dataclass

from chatgot.config.deepspeed_values import Problems, Values

TOTAL = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"


@dataclass(frozen=True)
class Batch:
    """Samples per optimizer step over all ranks, samples per rank and forward pass, forward passes per optimizer step."""

    total: int
    micro: int
    accumulation: int


def resolve_batch(values: Values, world_size: int, problems: Problems, notes: list[str]) -> Batch | None:
    """The three batch numbers as DeepSpeed derives them (runtime/config.py, _set_batch_related_parameters), but never rounded.

    Returns None after noting a problem: too few numbers, or numbers that do not fit `world_size` (with those that would).
    """
    given = {name: values[name] for name in (TOTAL, MICRO, ACCUMULATION)}
    if any(name in values.spelled and name not in values.given for name in given):
        return None  # mistyped, already noted
    known = {name: value for name, value in given.items() if isinstance(value, int)}
    autos = [name for name, value in given.items() if value == "auto"]
    if (autos and len(known) < 2) or not known.keys() & {TOTAL, MICRO}:
        name = autos[0] if autos else TOTAL
        message = f"give two of {TOTAL}, {MICRO} and {ACCUMULATION} as numbers, for example {TOTAL} and {MICRO}; the third is derived"
        if autos:
            problems.add(name, "auto", message)
        else:
            problems.missing(name, message)
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
    assert total is not None
    assert micro is not None
    assert accumulation is not None
    if total != micro * accumulation * world_size or not micro or not accumulation:
        problems.add(TOTAL, total, _mismatch(known, world_size))
        return None
    ranks = _ranks(world_size)
    equation = f"{micro} per rank x {accumulation} accumulation x {ranks}"
    if TOTAL not in known:
        changes = "" if ACCUMULATION in known else "; it changes with the number of ranks, state train_batch_size to keep it"
        notes.append(f"{TOTAL} = {total}: {equation}{changes}")
    if MICRO not in known:
        notes.append(f"{MICRO} = {micro}: {total} samples / {accumulation} accumulation / {ranks}")
    if ACCUMULATION not in known:
        notes.append(f"{ACCUMULATION} = {accumulation}: {total} samples / {micro} per rank / {ranks}")
    return Batch(total, micro, accumulation)


def _mismatch(known: dict[str, int], world_size: int) -> str:
    """What the numbers break, and the nearest ones that fit."""
    total, micro, accumulation = known[TOTAL], known.get(MICRO), known.get(ACCUMULATION)
    factors = [f"{MICRO} {micro}" if micro else "", f"{ACCUMULATION} {accumulation}" if accumulation else "", _ranks(world_size)]
    product = (micro or 1) * (accumulation or 1) * world_size
    relation = "equal" if micro and accumulation else "be a multiple of"
    options = []
    if relation == "equal":
        options.append(f"{TOTAL} = {product}")
    else:
        options.append(" or ".join(f"{TOTAL} = {n}" for n in (total // product * product, (total // product + 1) * product) if n))
    if micro and not total % (accumulation or 1):
        share, rest = divmod(total // (accumulation or 1), world_size)
        fitting = [m for m in range(1, share + 1) if share % m == 0] if not rest and not accumulation else [share] if not rest else []
        nearest = sorted(fitting, key=lambda m: (abs(m - micro), m))[:3]
        options.extend(f"{MICRO} = {m}" for m in sorted(nearest) if m != micro)
    if accumulation:
        share, rest = divmod(total, (micro or 1) * world_size)
        if not rest and micro:
            options.append(f"{ACCUMULATION} = {share}")
        elif not micro:
            per_rank, rest = divmod(total, world_size)
            fitting = [a for a in range(1, per_rank + 1) if per_rank % a == 0] if not rest else []
            options.extend(f"{ACCUMULATION} = {a}" for a in sorted(sorted(fitting, key=lambda a: (abs(a - accumulation), a))[:3]))
    return f"must {relation} {' x '.join(filter(None, factors))} = {product}; for {_ranks(world_size)} use {', or '.join(options)}"


def _ranks(world_size: int) -> str:
    return f"{world_size} rank" if world_size == 1 else f"{world_size} ranks"
