"""`chatgot tune`: find the micro-batch, recomputation, ZeRO stage and compilation that train fastest within the memory.

Every row of the table is a real run of a few steps in processes of its own (tuning/probe.py), but for those that the
memory plan puts far beyond the device.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatgot.config.overrides import parse_overrides
from chatgot.config.run import load_run_config
from chatgot.data.prepare import prepare_cached
from chatgot.data.prepared import check_block_size
from chatgot.deepspeed_json.read import name_of, read_document
from chatgot.deepspeed_json.resolve import build_engine_config
from chatgot.deepspeed_json.schema import ACCUMULATION, MICRO, TOTAL
from chatgot.deepspeed_json.values import apply_overrides
from chatgot.devices import GIB, DeviceFacts, device_facts, device_of_machine
from chatgot.errors import ConfigError, MachineError
from chatgot.files import write_atomically
from chatgot.tuning.micro_batch import MARGIN, candidates, largest_that_fits
from chatgot.tuning.probe import Outcome, Probes, Task

logger = logging.getLogger(__name__)

ZERO = "zero_optimization"
SECTION = "activation_checkpointing"
NOT_RUN = Outcome(False)


@dataclass(frozen=True)
class TuneArguments:
    """The command line of `chatgot tune`; None: the default that fits the machine."""

    deepspeed_config: Path
    config: str = "tiny"
    data: str = "wars_of_the_roses"
    world_size: int = 1
    out: Path | None = None
    """Where the fastest that fits is written."""
    micro_batches: tuple[int, ...] | None = None
    stages: tuple[int, ...] | None = None
    recomputation: tuple[str, ...] | None = None
    compile: tuple[str, ...] | None = None
    steps: int = 4
    margin: float = MARGIN
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One way of running, and what came of it."""

    stage: int
    recomputed: str
    compiled: str
    tree: dict[str, Any]
    """The JSON that runs so, micro-batch left out."""
    micro_batch: int | None = None
    outcome: Outcome = NOT_RUN

    def cells(self) -> tuple[str, ...]:
        """Its line of the table, a text for each of HEAD."""
        outcome, micro = self.outcome, str(self.micro_batch or "-")
        memory = f"{outcome.peak_bytes / GIB:.2f}" if outcome.peak_bytes else "-"
        speed = f"{outcome.tokens_per_sec:,.0f}" if outcome.fits else "-"
        return (str(self.stage), self.recomputed, self.compiled, micro, memory, speed, outcome.reason or "fits")


HEAD = ("ZeRO", "recomputed", "compiled", "micro-batch", "peak GiB", "tokens/s", "result")


def tune(arguments: TuneArguments) -> Row:
    """Try, log the table, and write the fastest JSON that fits; returns its row.

    Raises:
        ConfigError: the JSON or the arguments are wrong; it has no train_batch_size.
        MachineError: nothing fits.
    """
    run_overrides, ds_overrides = parse_overrides(list(arguments.overrides))
    config = load_run_config(arguments.config, run_overrides)
    facts, world_size = device_facts(), arguments.world_size
    document = read_document(arguments.deepspeed_config)
    tree = apply_overrides(document.tree, ds_overrides)
    stated = build_engine_config(tree, document.name, world_size=world_size, facts=facts)  # refuses all other problems
    total, zero = stated.train_batch_size, tree.get(ZERO)
    tree = {**tree, TOTAL: total, ZERO: {**(zero if isinstance(zero, dict) else {}), "stage": stated.zero_stage}}
    data = prepare_cached(arguments.data, config.data)
    check_block_size(data.meta, config.model.max_seq_length)
    model, vocab_size = config.model.model_dump(), data.tokenizer.vocab_size
    probes = Probes(device_of_machine(facts), tuple(range(world_size)), world_size, arguments.margin)
    possible = candidates(total, world_size)
    sizes = possible if arguments.micro_batches is None else sorted(set(arguments.micro_batches))
    if wrong := set(sizes) - set(possible):
        raise ConfigError(
            f"--micro_batches {' '.join(map(str, sorted(wrong)))}: {TOTAL} = {total} on {world_size} rank(s) can be "
            f"made of {', '.join(map(str, possible))}"
        )
    rows: list[Row] = []

    def add(row: Row) -> bool:
        rows.append(row)
        logger.info(" | ".join(row.cells()))
        return row.outcome.fits

    def measure(kind: Row, micro: int) -> bool:
        outcome = probes.outcome(Task(_with_micro_batch(kind.tree, micro), model, vocab_size, arguments.steps))
        return add(dataclasses.replace(kind, micro_batch=micro, outcome=outcome))

    for kind in variants(tree, arguments, facts):
        try:
            first = _with_micro_batch(kind.tree, sizes[0])
            resolved = build_engine_config(first, "tuned", world_size=world_size, facts=facts)
            if resolved.zero_stage != kind.stage:
                raise ConfigError(next(one.why for one in resolved.findings if one.key == f"{ZERO}.stage"))
        except ConfigError as error:
            refusal = str(error).split("\n")[0].removeprefix("tuned: ")
            add(dataclasses.replace(kind, outcome=Outcome(False, f"refused: {refusal}")))
        else:
            largest_that_fits(sizes, functools.partial(measure, kind))
    for line in table([row.cells() for row in rows]):
        logger.info(line)
    return _fastest(rows, arguments, total)


def variants(tree: dict[str, Any], arguments: TuneArguments, facts: DeviceFacts) -> Iterator[Row]:
    """Yield every way of running that is to be tried, nothing measured yet."""
    zero = tree[ZERO]
    stages = arguments.stages or ((0, 1, 2, 3) if arguments.world_size > 1 else (zero["stage"],))
    recomputation = arguments.recomputation or ("off", "on")
    compilation = arguments.compile or (("off", "on") if facts.kind == "cuda" else ("off",))
    section = tree.get(SECTION)
    for stage, recomputed, compiled in itertools.product(stages, recomputation, compilation):
        variant = {**deepcopy(tree), ZERO: {**zero, "stage": stage}}
        chatgot = variant.setdefault("chatgot", {})
        if recomputed == "on":
            variant[SECTION] = section if isinstance(section, dict) else {}
        else:
            variant.pop(SECTION, None)
            chatgot.pop(SECTION, None)
        chatgot["compile"] = {**(chatgot.get("compile") or {}), "enabled": compiled == "on"}
        yield Row(stage, recomputed, compiled, variant)


def _with_micro_batch(tree: dict[str, Any], micro: int) -> dict[str, Any]:
    return {**{key: value for key, value in tree.items() if key != ACCUMULATION}, MICRO: micro}


def _fastest(rows: Sequence[Row], arguments: TuneArguments, total: int) -> Row:
    """Log the fastest row that fits, and write its JSON. MachineError where none fits."""
    best = max((row for row in rows if row.outcome.fits), key=lambda row: row.outcome.tokens_per_sec, default=None)
    if best is None:
        raise MachineError(
            f"{name_of(arguments.deepspeed_config)}: nothing that was tried fits into memory; see the table"
        )
    assert best.micro_batch is not None
    logger.info(
        f"fastest that leaves {arguments.margin:.0%} of the memory free: ZeRO stage {best.stage}, recomputation "
        f"{best.recomputed}, compilation {best.compiled}, micro-batch {best.micro_batch}, accumulation "
        f"{total // (best.micro_batch * arguments.world_size)}, global batch {total} as before"
    )
    if arguments.out is not None:
        write_atomically(arguments.out, json.dumps(_with_micro_batch(best.tree, best.micro_batch), indent=2) + "\n")
        logger.info(f"written: {arguments.out}")
    return best


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table with columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(HEAD, *rows)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in (HEAD, *rows)]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
