"""Command lines. Nothing here imports torch before the arguments are parsed, so that --help answers at once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from chatgot import __version__
from chatgot.errors import (
    EXIT_CHECKPOINT,
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    ChatGoTError,
    MachineError,
)

TRAIN_EPILOG = """overrides follow the flags and edit the one home of a key:
  model.n_layers=4  data.tokenizer=byte  train.max_steps=200      the run YAML
  ds.optimizer.params.lr=3e-4  ds.chatgot.checkpoint.keep_last=5  the DeepSpeed JSON

exit codes: 0 done, 2 usage or configuration, 3 data, 4 checkpoint, 5 numerics, 6 environment, 75 interrupted and
saved"""


class _RankParser(argparse.ArgumentParser):
    """Every rank refuses a wrong command line, and rank 0 says why."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") != "0":
            sys.exit(EXIT_CONFIG)
        super().error(message)


def train_parser() -> argparse.ArgumentParser:
    """Arguments of launch/train.py and `chatgot train`."""
    parser = _RankParser(
        prog="train.py",
        description="Train a GPT on your own text with DeepSpeed.",
        epilog=TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--deepspeed_config", required=True, metavar="JSON", help="how it is run: a DeepSpeed JSON, see ds_configs/"
    )
    parser.add_argument(
        "--config", default="tiny", metavar="NAME|YAML", help="what is trained: a preset or a run YAML (default: tiny)"
    )
    parser.add_argument(
        "--data",
        default="wars_of_the_roses",
        metavar="SPEC",
        help="a text file, a folder of them, a prepared folder, or a built-in corpus (default: wars_of_the_roses)",
    )
    parser.add_argument("--out_dir", required=True, type=Path, help="the run folder")
    parser.add_argument(
        "--resume_from",
        default="auto",
        metavar="auto|must|never|PATH[@TAG]",
        help="auto: go on if the run folder has a checkpoint, else start, and say which (default)",
    )
    parser.add_argument(
        "--allow_data_change",
        action="store_true",
        help="resume with other data, or with another train.seed, which orders them; the run goes on at the same sample number",
    )
    parser.add_argument("--allow_batch_change", action="store_true", help="resume with another train_batch_size")
    parser.add_argument("--run_name", help="name on the dashboard (default: the run folder's name)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a refusal")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by launchers")
    parser.add_argument(
        "--deepspeed", action="store_true", help="accepted from stock command lines; the engine is always DeepSpeed's"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides, see below")
    return parser


def train(argv: Sequence[str] | None = None) -> None:
    """launch/train.py: train, and end the process with the exit code of the run."""
    arguments = train_parser().parse_args(argv)

    def program() -> int:
        from chatgot.training.run import TrainArguments, leave
        from chatgot.training.run import train as run

        code = run(
            TrainArguments(
                deepspeed_config=arguments.deepspeed_config,
                out_dir=arguments.out_dir,
                config=arguments.config,
                data=arguments.data,
                resume_from=arguments.resume_from,
                allow_data_change=arguments.allow_data_change,
                allow_batch_change=arguments.allow_batch_change,
                overrides=tuple(arguments.overrides),
                run_name=arguments.run_name,
                local_rank=arguments.local_rank,
            )
        )
        leave()
        return code

    code = guarded(program, arguments.debug)
    if code not in (EXIT_DONE, EXIT_INTERRUPTED) and os.environ.get("WORLD_SIZE", "1") != "1":
        # The process group is still joined. Torn down by the interpreter while other ranks go away, gloo's threads
        # abort it (SIGABRT) in place of the exit code, and NCCL waits for the others; destroying the group needs all
        # ranks, which an error does not have.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """The `chatgot` command."""
    parser = argparse.ArgumentParser(
        prog="chatgot", description="Train a GPT on your own text with DeepSpeed, and use it."
    )
    parser.add_argument("--version", action="version", version=f"chatgot {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("train", help="train, in one process; the same as python launch/train.py", add_help=False)

    prepare = commands.add_parser("prepare", help="turn text into tokens on disk")
    prepare.add_argument("text", nargs="+", metavar="TEXT", help="text files, folders of them, or a built-in corpus")
    prepare.add_argument("--out", required=True, type=Path, help="the prepared folder, for --data")
    prepare.add_argument(
        "--config", default="tiny", metavar="NAME|YAML", help="its data section says how (default: tiny)"
    )
    prepare.add_argument("overrides", nargs="*", metavar="KEY=VALUE", default=[], help=argparse.SUPPRESS)

    sample = commands.add_parser("sample", help="draw text from a run folder")
    sample.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    sample.add_argument("--prompt", default="\n", help="text to continue (default: a line break)")
    sample.add_argument("--max_new_tokens", type=int, default=256, help="tokens to draw (default: 256)")
    sample.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    sample.add_argument("--top_k", type=int, help="draw from the k likeliest tokens only")
    sample.add_argument("--top_p", type=float, help="draw from the likeliest tokens that make up this probability")
    sample.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    sample.add_argument("--num_samples", type=int, default=1, help="continuations to draw (default: 1)")
    sample.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    sample.add_argument("--tag", help="checkpoint to use (default: the newest)")
    sample.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: cuda where there is one"
    )

    check = commands.add_parser("check", help="say everything about a DeepSpeed JSON before anything runs")
    check.add_argument("json", nargs="?", metavar="JSON", help="the DeepSpeed JSON")
    check.add_argument(
        "--config", metavar="NAME|YAML", help="a preset or run YAML: gives the model's size, and with it bucket sizes"
    )
    check.add_argument(
        "--vocab_size", type=int, help="of the model in --config (default: the bpe tokenizer's, else 256)"
    )
    check.add_argument("--world_size", type=int, default=1, metavar="N", help="number of ranks (default: 1)")
    check.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cuda", "cpu"),
        help="what the run will have (default: this machine's)",
    )
    check.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="overrides, as after train.py's flags",
    )
    check.add_argument("--format", default="text", choices=("text", "json"), help="json: for editors and CI")
    check.add_argument("--effective", action="store_true", help="print every value in use and where it comes from")
    check.add_argument(
        "--explain", metavar="KEY", help="what a key does, its default, what it interacts with; needs no JSON"
    )

    verify = commands.add_parser(
        "verify", help="check a run folder: every checkpoint's files, and that the journal is whole"
    )
    verify.add_argument("run", type=Path, metavar="RUN", help="the run folder; it is only read, also while it trains")
    verify.add_argument(
        "--replay",
        type=_steps,
        metavar="K",
        help="train K steps from a checkpoint again and compare them with the journal",
    )
    verify.add_argument(
        "--tag", help="check this checkpoint only, and replay from it (default: all; the oldest with K steps after it)"
    )

    plan = commands.add_parser("plan", help="memory, speed and checkpoint size of a run, before it starts")
    plan.add_argument(
        "deepspeed_config", nargs="?", type=Path, metavar="JSON", help="how it is run; with --sweep a folder"
    )
    plan.add_argument(
        "--config", default="tiny", metavar="NAME|YAML", help="what is trained: a preset or a run YAML (default: tiny)"
    )
    plan.add_argument("--world_size", type=int, default=1, metavar="N", help="number of ranks (default: 1)")
    plan.add_argument(
        "--device",
        default="h200",
        metavar="NAME|BYTES",
        help="h200, a100-80, rtx4090, ..., cpu, or 24GiB (default: h200)",
    )
    plan.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides", help="overrides, as train.py takes them"
    )
    plan.add_argument(
        "--vocab_size", type=int, metavar="V", help="of the tokenizer (default: what the YAML says of it)"
    )
    plan.add_argument(
        "--sweep", action="store_true", help="a table of all JSONs in ds_configs/, or in the folder given"
    )
    plan.add_argument(
        "--format", default="text", choices=("text", "json"), help="json: for programs, sizes in bytes (default: text)"
    )

    tune = commands.add_parser(
        "tune", help="find the micro-batch, recomputation, ZeRO stage and compilation that train fastest and fit"
    )
    tune.add_argument("deepspeed_config", type=Path, metavar="JSON", help="a DeepSpeed JSON; its global batch stays")
    tune.add_argument(
        "--config", default="tiny", metavar="NAME|YAML", help="the model: a preset or a run YAML (default: tiny)"
    )
    tune.add_argument(
        "--data", default="wars_of_the_roses", metavar="SPEC", help="as for train; only its vocabulary matters"
    )
    tune.add_argument(
        "--world_size", type=_count, default=1, metavar="N", help="ranks, all on this machine (default: 1)"
    )
    tune.add_argument("--out", type=Path, metavar="PATH", help="write the fastest that fits as a ready JSON")
    tune.add_argument(
        "--micro_batches",
        type=_count,
        nargs="+",
        metavar="N",
        help="only these (default: all that make the global batch)",
    )
    tune.add_argument(
        "--stages", type=int, nargs="+", choices=range(4), help="ZeRO stages (default: all; with one rank the JSON's)"
    )
    tune.add_argument(
        "--recomputation", nargs="+", choices=("off", "on"), help="activation checkpointing (default: both)"
    )
    tune.add_argument("--compile", nargs="+", choices=("off", "on"), help="torch.compile (default: both, on a CPU off)")
    tune.add_argument(
        "--steps", type=_steps, default=4, metavar="K", help="optimizer steps of a measurement (default: 4)"
    )
    tune.add_argument("overrides", nargs="*", metavar="KEY=VALUE", default=[], help=argparse.SUPPRESS)

    for command in (prepare, sample, verify, check, plan, tune):
        command.add_argument("--debug", action="store_true", help="show the traceback of a refusal")

    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        train(argv[1:])
    arguments = parser.parse_args(argv)
    programs = {
        "prepare": _prepare,
        "sample": _sample,
        "verify": _verify,
        "check": _check,
        "plan": _plan,
        "tune": _tune,
    }
    sys.exit(guarded(lambda: programs[arguments.command](arguments), arguments.debug))


def _prepare(arguments: argparse.Namespace) -> int:
    from chatgot.config.overrides import parse_overrides
    from chatgot.config.run import load_run_config
    from chatgot.data.prepare import prepare

    texts = [text for text in arguments.text if "=" not in text or Path(text).exists()]
    overrides, _ = parse_overrides([text for text in arguments.text if text not in texts])
    config = load_run_config(arguments.config, overrides)
    prepared = prepare(texts, arguments.out, config.data, block_size=config.model.max_seq_length)
    print(f"prepared {prepared.path}: use it with --data {prepared.path}")
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from chatgot.inference.sample import SampleArguments, sample

    names = SampleArguments.__dataclass_fields__
    sample(SampleArguments(**{name: value for name, value in vars(arguments).items() if name in names}))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from chatgot.config.overrides import parse_overrides
    from chatgot.config.run import load_run_config
    from chatgot.deepspeed_json import check
    from chatgot.deepspeed_json.explain import explain
    from chatgot.devices import assumed_device
    from chatgot.errors import ConfigError
    from chatgot.model.shapes import count_parameters

    if arguments.explain is not None:
        print(explain(arguments.explain))
        return EXIT_DONE
    if arguments.json is None:
        raise ConfigError(
            "chatgot check: give a DeepSpeed JSON, for example ds_configs/bf16_zero1.json; or --explain KEY"
        )
    if arguments.world_size < 1 or (arguments.vocab_size is not None and arguments.vocab_size < 1):
        raise ConfigError("chatgot check: --world_size and --vocab_size are whole numbers >= 1")
    run_overrides, ds_overrides, refused, n_params = {}, {}, (), None
    try:
        run_overrides, ds_overrides = parse_overrides(arguments.set)
    except ConfigError as error:
        refused = check.findings_of(error, "--set")
    try:
        config = load_run_config(arguments.config or "tiny", run_overrides)
        vocab_size = arguments.vocab_size or (config.data.bpe_vocab_size if config.data.tokenizer == "bpe" else 256)
        n_params = count_parameters(config.model, vocab_size) if arguments.config else None
    except ConfigError as error:
        refused += check.findings_of(error, "--config")
    facts = assumed_device(arguments.device)
    report = check.check(arguments.json, ds_overrides, world_size=arguments.world_size, facts=facts, n_params=n_params)
    report = replace(report, findings=(*refused, *report.findings))
    if arguments.format == "json":
        print(check.as_json(report, arguments.effective))
    else:
        for line in check.as_text(report, arguments.effective):
            print(line)
    return report.exit_code


def _tune(arguments: argparse.Namespace) -> int:
    from chatgot.tuning.tune import TuneArguments, tune

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    given = {name: value for name, value in vars(arguments).items() if name in TuneArguments.__dataclass_fields__}
    lists: dict[str, Any] = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    tune(TuneArguments(**{**given, **lists}))
    return EXIT_DONE


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps from 1 on")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _verify(arguments: argparse.Namespace) -> int:
    from chatgot.verify.verify import verify

    whole = verify(arguments.run, arguments.tag)
    if arguments.replay is not None:
        from chatgot.verify.replay import replay

        whole = replay(arguments.run, arguments.replay, arguments.tag) and whole
    return EXIT_DONE if whole else EXIT_CHECKPOINT


def _plan(arguments: argparse.Namespace) -> int:
    from chatgot.plan.command import PlanArguments, plan

    names = PlanArguments.__dataclass_fields__
    print(plan(PlanArguments(**{name: value for name, value in vars(arguments).items() if name in names})))
    return 0


def guarded(program: Callable[[], int], debug: bool) -> int:
    """Run `program`; a refusal becomes one message on rank 0 and its exit code."""
    try:
        return program()
    except ChatGoTError as error:
        if debug:
            traceback.print_exc()
        elif os.environ.get("RANK", "0") == "0" or isinstance(error, MachineError):
            print(f"chatgot: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output went away (`chatgot sample ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
