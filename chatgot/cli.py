"""Command lines. Nothing here imports torch before the arguments are parsed, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import NoReturn, TypeVar

from chatgot.errors import EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_DONE, ChatGoTError, MachineError
from chatgot.version import __version__

T = TypeVar("T")

TRAIN_EPILOG = """overrides follow the flags and edit the one home of a key:
  model.n_layers=4  data.tokenizer=byte  train.max_steps=200      the run YAML
  ds.optimizer.params.lr=3e-4  ds.chatgot.checkpoint.keep_last=5  the DeepSpeed JSON

exit codes: 0 done, 2 usage or configuration, 3 data, 4 checkpoint, 5 numerics, 6 environment, 75 interrupted and
saved, or the micro-batch made smaller because memory ran out: run the same command again"""


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
    add = parser.add_argument
    how = "how it is run: a DeepSpeed JSON, or the name of a shipped one (chatgot configs)"
    add("--deepspeed_config", required=True, metavar="NAME|JSON", help=how)
    _config(parser, "what is trained: a preset (chatgot presets) or a run YAML")
    text = "a text file, a folder of them, a prepared folder, or a built-in corpus (default: wars_of_the_roses)"
    add("--data", default="wars_of_the_roses", metavar="SPEC", help=text)
    add("--out_dir", required=True, type=Path, help="the run folder")
    resume = "auto: go on from its newest checkpoint, else start (default)"
    add("--resume_from", default="auto", metavar="auto|must|never|PATH[@TAG]", help=resume)
    change = "resume with other data, or with another train.seed, which orders them; the run goes on at the same sample"
    add("--allow_data_change", action="store_true", help=f"{change} number")
    add("--allow_batch_change", action="store_true", help="resume with another train_batch_size")
    add("--run_name", help="name on the dashboard (default: the run folder's name)")
    add("--debug", action="store_true", help="show the traceback of a refusal")
    add("--local_rank", "--local-rank", type=int, help="set by launchers")
    add("--deepspeed", action="store_true", help="accepted from stock command lines; the engine is always DeepSpeed's")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="overrides, see below")
    return parser


def train(argv: Sequence[str] | None = None) -> None:
    """launch/train.py: train, and end the process with the exit code of the run."""
    arguments, left = train_parser().parse_args(argv), False

    def program() -> int:
        nonlocal left
        from chatgot.deepspeed_json.read import find_json
        from chatgot.training.run import TrainArguments, leave
        from chatgot.training.run import train as run

        json = str(find_json(arguments.deepspeed_config))
        code = run(replace(_given(TrainArguments, arguments), deepspeed_config=json))
        leave()
        left = True
        return code

    code = guarded(program, arguments.debug)
    if not left and os.environ.get("WORLD_SIZE", "1") != "1":
        # The process group is still joined. Torn down by the interpreter while other ranks go away, gloo's threads
        # abort it (SIGABRT) in place of the exit code, and NCCL waits for the others; destroying the group needs all
        # ranks, which an error does not have.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """The `chatgot` command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if argv[:1] == ["train"]:
        train(argv[1:])
    arguments = _parser().parse_args(argv or ["--help"])
    sys.exit(guarded(lambda: arguments.program(arguments), arguments.debug))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chatgot",
        description="Train a GPT on your own text with DeepSpeed, and use it.",
        epilog="chatgot help COMMAND says more about one of them.",
    )
    parser.add_argument("--version", action="version", version=f"chatgot {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, program: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        added.set_defaults(program=program)
        added.add_argument("--debug", action="store_true", help="show the traceback of a refusal")
        return added

    commands.add_parser("train", help="train, in one process; the same as python launch/train.py", add_help=False)
    _prepare_options(command("prepare", _prepare, "turn text into tokens on disk"))
    _sample_options(command("sample", _sample, "draw text from a run folder"))
    _verify_options(command("verify", _verify, "check a run folder: files of every checkpoint, and the journal"))
    _check_options(command("check", _check, "say everything about a DeepSpeed JSON before anything runs"))
    _plan_options(command("plan", _plan, "memory, speed and checkpoint size of a run, before it starts"))
    _tune_options(command("tune", _tune, "find the micro-batch, ZeRO stage and other settings that train fastest"))
    command("presets", _presets, "list the models that ship, for --config")
    command("configs", _configs, "list the DeepSpeed JSONs that ship, for --deepspeed_config")
    return parser


def _config(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--config", default="tiny", metavar="NAME|YAML", help=f"{what} (default: tiny)")


def _prepare_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("text", nargs="+", metavar="TEXT", help="text files, folders of them, or a built-in corpus")
    add("--out", required=True, type=Path, help="the prepared folder, for --data")
    _config(parser, "its data section says how")
    add("overrides", nargs="*", metavar="KEY=VALUE", default=[], help=argparse.SUPPRESS)


def _sample_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run folder")
    add("--prompt", default="\n", help="text to continue (default: a line break)")
    add("--max_new_tokens", type=int, default=256, help="tokens to draw (default: 256)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    add("--top_k", type=int, help="draw from the k likeliest tokens only")
    add("--top_p", type=float, help="draw from the likeliest tokens that make up this probability")
    add("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    add("--num_samples", type=int, default=1, help="continuations to draw (default: 1)")
    add("--greedy", action="store_true", help="always take the likeliest token")
    add("--tag", help="checkpoint to use (default: the newest)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: cuda where there is one")


def _check_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("json", nargs="?", metavar="JSON", help="the DeepSpeed JSON, or the name of a shipped one")
    add("--config", metavar="NAME|YAML", help="a preset or run YAML: gives the model's size, and with it bucket sizes")
    add("--vocab_size", type=int, help="of the model in --config (default: the bpe tokenizer's, else 256)")
    add("--world_size", type=int, default=1, metavar="N", help="number of ranks (default: 1)")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="of the run (default: this machine's)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides, as for train.py")
    add("--format", default="text", choices=("text", "json"), help="json: for editors and CI")
    add("--effective", action="store_true", help="print every value in use and where it comes from")
    add("--explain", metavar="KEY", help="what a key does, its default, what it interacts with; needs no JSON")


def _verify_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run folder; it is only read, also while it trains")
    add("--replay", type=_count, metavar="K", help="train K steps from a checkpoint again and compare with the journal")
    add("--tag", help="check this checkpoint only, and replay from it (default: all; the oldest with K steps after it)")


def _plan_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    how = "how it is run: a DeepSpeed JSON, or the name of a shipped one; with --sweep a folder"
    add("deepspeed_config", nargs="?", type=Path, metavar="JSON", help=how)
    _config(parser, "what is trained: a preset or a run YAML")
    add("--world_size", type=int, default=1, metavar="N", help="number of ranks (default: 1)")
    add("--device", default="h200", metavar="NAME|BYTES", help="h200, rtx4090, ..., cpu, or 24GiB (default: h200)")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides", help="overrides, as for train.py")
    add("--vocab_size", type=int, metavar="V", help="of the tokenizer (default: what the YAML says of it)")
    add("--sweep", action="store_true", help="a table of all JSONs that ship, or of those in the folder given")
    add("--format", default="text", choices=("text", "json"), help="json: for programs, in bytes")


def _tune_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    how = "a DeepSpeed JSON, or the name of a shipped one; its global batch stays"
    add("deepspeed_config", type=Path, metavar="JSON", help=how)
    _config(parser, "the model: a preset or a run YAML")
    add("--data", default="wars_of_the_roses", metavar="SPEC", help="as for train; only its vocabulary matters")
    add("--world_size", type=_count, default=1, metavar="N", help="ranks, all on this machine (default: 1)")
    add("--out", type=Path, metavar="PATH", help="write the fastest that fits as a ready JSON")
    sizes = "only these (default: all that make the global batch)"
    add("--micro_batches", type=_count, nargs="+", metavar="N", help=sizes)
    add("--stages", type=int, nargs="+", choices=range(4), help="ZeRO stages (default: all; with one rank the JSON's)")
    add("--recomputation", nargs="+", choices=("off", "on"), help="activation checkpointing (default: both)")
    add("--compile", nargs="+", choices=("off", "on"), help="torch.compile (default: both, on a CPU off)")
    add("--steps", type=_count, default=4, metavar="K", help="optimizer steps of a measurement (default: 4)")
    add("overrides", nargs="*", metavar="KEY=VALUE", default=[], help=argparse.SUPPRESS)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _given(kind: Callable[..., T], arguments: argparse.Namespace) -> T:
    """Make the arguments of a room's function from those of a command line, lists as tuples."""
    given = {name: value for name, value in vars(arguments).items() if name in signature(kind).parameters}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _show_log() -> None:
    """Print what the package logs, as a run does."""
    from chatgot.observe.progress import Progress, show_log

    show_log(Progress(0))


def _prepare(arguments: argparse.Namespace) -> int:
    from chatgot.config.overrides import parse_overrides
    from chatgot.config.run import load_run_config
    from chatgot.data.prepare import prepare

    _show_log()
    texts = [text for text in arguments.text if "=" not in text or Path(text).exists()]
    overrides, _ = parse_overrides([text for text in arguments.text if text not in texts])
    config = load_run_config(arguments.config, overrides)
    prepared = prepare(texts, arguments.out, config.data, block_size=config.model.max_seq_length)
    print(f"prepared {prepared.path}: use it with --data {prepared.path}")
    return EXIT_DONE


def _sample(arguments: argparse.Namespace) -> int:
    from chatgot.inference.sample import SampleArguments, sample

    sample(_given(SampleArguments, arguments))
    return EXIT_DONE


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
        raise ConfigError("chatgot check: give a DeepSpeed JSON, for example bf16_zero1; or --explain KEY")
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
    lines = check.as_text(report, arguments.effective) if arguments.format == "text" else None
    print("\n".join(lines) if lines else check.as_json(report, arguments.effective))
    return report.exit_code


def _tune(arguments: argparse.Namespace) -> int:
    from chatgot.deepspeed_json.read import find_json
    from chatgot.tuning.tune import TuneArguments, tune

    _show_log()
    tune(replace(_given(TuneArguments, arguments), deepspeed_config=find_json(arguments.deepspeed_config)))
    return EXIT_DONE


def _verify(arguments: argparse.Namespace) -> int:
    from chatgot.verify.verify import verify

    whole = verify(arguments.run, arguments.tag)
    if arguments.replay is not None:
        from chatgot.verify.replay import replay

        whole = replay(arguments.run, arguments.replay, arguments.tag) and whole
    return EXIT_DONE if whole else EXIT_CHECKPOINT


def _plan(arguments: argparse.Namespace) -> int:
    from chatgot.plan.command import PlanArguments, plan

    print(plan(_given(PlanArguments, arguments)))
    return EXIT_DONE


def _presets(arguments: argparse.Namespace) -> int:
    from chatgot.config.run import load_run_config, preset_names
    from chatgot.model.shapes import count_parameters

    rows = [("PRESET", "ARCHITECTURE", "PARAMETERS", "WIDTH x LAYERS x HEADS", "CONTEXT", "TOKENIZER")]
    for name in preset_names():
        config = load_run_config(name)
        model, data = config.model, config.data
        count = count_parameters(model, data.bpe_vocab_size if data.tokenizer == "bpe" else 95)
        shape = f"{model.d_model} x {model.n_layers} x {model.n_head}"
        rows.append((name, model.architecture, f"{count:,}", shape, f"{model.max_seq_length}", data.tokenizer))
    _print_table(rows)
    print("parameters: with the tokenizer's vocabulary for bpe, with 95 characters for char")
    return EXIT_DONE


def _configs(arguments: argparse.Namespace) -> int:
    from chatgot.deepspeed_json.read import shipped_table

    _print_table([("CONFIG", "PRECISION", "ZERO", "USE IT WHEN"), *shipped_table()])
    return EXIT_DONE


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows, the first of which is the head, as columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())


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
        return EXIT_DONE
    except KeyboardInterrupt:
        return 130
