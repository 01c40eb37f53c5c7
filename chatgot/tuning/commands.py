"""Command lines of `chatgot check`, `plan` and `tune`: what is known of a run before it starts. Imports no torch
before a command runs.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from chatgot.errors import EXIT_DONE
from chatgot.launcher.arguments import Command, config_argument, count, given_to, overrides_argument


def add_checks(command: Command) -> None:
    """Add the commands that judge a DeepSpeed JSON."""
    add = command("check", _check, "say everything about a DeepSpeed JSON before anything runs")
    add("json", nargs="?", metavar="JSON", help="the DeepSpeed JSON, or the name of a shipped one")
    add("--config", metavar="NAME|YAML", help="a preset or run YAML: gives the model's size, and with it bucket sizes")
    add("--vocab_size", type=count, help="of the model in --config (default: the bpe tokenizer's, else 256)")
    add("--world_size", type=count, default=1, metavar="N", help="number of ranks (default: 1)")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="of the run (default: this machine's)")
    overrides_argument(add)
    add("--strict", action="store_true", help="every warning about the JSON is an error")
    add("--format", default="text", choices=("text", "json"), help="json: for editors and CI")
    add("--effective", action="store_true", help="print every value in use and where it comes from")
    table = "print what of a stock JSON is passed on, adapted and refused, as a table; needs no JSON"
    add("--rules", action="store_true", help=table)
    add("--explain", metavar="KEY", help="what a key does, its default, what it interacts with; needs no JSON")

    add = command("plan", _plan, "memory, speed and checkpoint size of a run, before it starts")
    how = "how it is run: a DeepSpeed JSON, or the name of a shipped one; with --sweep a folder"
    add("deepspeed_config", nargs="?", type=Path, metavar="JSON", help=how)
    config_argument(add, "what is trained: a preset or a run YAML")
    add("--world_size", type=int, default=1, metavar="N", help="number of ranks (default: 1)")
    add("--device", default="h200", metavar="NAME|BYTES", help="h200, rtx4090, ..., cpu, or 24GiB (default: h200)")
    overrides_argument(add)
    add("--vocab_size", type=int, metavar="V", help="of the tokenizer (default: what the YAML says of it)")
    add("--sweep", action="store_true", help="a table of all JSONs that ship, or of those in the folder given")
    add("--format", default="text", choices=("text", "json"), help="json: for programs, in bytes")

    add = command("tune", _tune, "find the micro-batch, ZeRO stage and other settings that train fastest")
    how = "a DeepSpeed JSON, or the name of a shipped one; its global batch stays"
    add("deepspeed_config", type=Path, metavar="JSON", help=how)
    config_argument(add, "the model: a preset or a run YAML")
    add("--data", default="wars_of_the_roses", metavar="SPEC", help="as for train; only its vocabulary matters")
    add("--world_size", type=count, default=1, metavar="N", help="ranks, all on this machine (default: 1)")
    add("--out", type=Path, metavar="PATH", help="write the fastest that fits as a ready JSON")
    sizes = "only these (default: all that make the global batch)"
    add("--micro_batches", type=count, nargs="+", metavar="N", help=sizes)
    add("--stages", type=int, nargs="+", choices=range(4), help="ZeRO stages (default: all; with one rank the JSON's)")
    add("--recomputation", nargs="+", choices=("off", "on"), help="activation checkpointing (default: both)")
    add("--compile", nargs="+", choices=("off", "on"), help="torch.compile (default: both, on a CPU off)")
    add("--steps", type=count, default=4, metavar="K", help="optimizer steps of a measurement (default: 4)")
    add("overrides", nargs="*", metavar="KEY=VALUE", default=[], help=argparse.SUPPRESS)


def _check(arguments: argparse.Namespace) -> int:
    from chatgot.config.overrides import parse_overrides
    from chatgot.config.run import RunConfig, load_run_config
    from chatgot.deepspeed_json import check
    from chatgot.deepspeed_json.explain import explain, verdict_table
    from chatgot.devices import assumed_device
    from chatgot.errors import ConfigError
    from chatgot.model.shapes import count_parameters

    if arguments.rules or arguments.explain is not None:
        print(verdict_table(with_reasons=True) if arguments.rules else explain(arguments.explain, RunConfig))
        return EXIT_DONE
    if arguments.json is None:
        raise ConfigError("chatgot check: give a DeepSpeed JSON, for example bf16_zero1; or --explain KEY")
    run_overrides, ds_overrides, refused, n_params, max_steps = {}, {}, (), None, None
    try:
        run_overrides, ds_overrides = parse_overrides(arguments.overrides)
    except ConfigError as error:
        refused = check.findings_of(error, "--set")
    try:
        config = load_run_config(arguments.config or "tiny", run_overrides)
        vocab_size = arguments.vocab_size or (config.data.bpe_vocab_size if config.data.tokenizer == "bpe" else 256)
        if arguments.config:
            n_params, max_steps = count_parameters(config.model, vocab_size), config.train.max_steps
    except ConfigError as error:
        refused += check.findings_of(error, "--config")
    facts = assumed_device(arguments.device)
    size = {"world_size": arguments.world_size, "n_params": n_params, "max_steps": max_steps}
    report = check.check(arguments.json, ds_overrides, facts=facts, strict=arguments.strict, **size)
    report = replace(report, findings=(*refused, *report.findings))
    lines = check.as_text(report, arguments.effective) if arguments.format == "text" else None
    print("\n".join(lines) if lines else check.as_json(report, arguments.effective))
    return report.exit_code


def _plan(arguments: argparse.Namespace) -> None:
    from chatgot.plan.command import plan

    print(given_to(plan, arguments))


def _tune(arguments: argparse.Namespace) -> None:
    from chatgot.deepspeed_json.read import find_json
    from chatgot.observe.progress import show_log
    from chatgot.tuning.tune import TuneArguments, tune

    show_log()
    tune(replace(given_to(TuneArguments, arguments), deepspeed_config=find_json(arguments.deepspeed_config)))
