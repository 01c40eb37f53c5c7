"""Command lines. Nothing here imports torch before the arguments are parsed, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import chatgot.proof.fed as fed
from chatgot.deepspeed_json.findings import meant
from chatgot.errors import EXIT_CHECKPOINT, EXIT_DONE
from chatgot.launcher.arguments import (
    Add,
    Command,
    Parser,
    Program,
    RankParser,
    config_argument,
    count,
    duration,
    given_to,
    imported,
    overrides_argument,
    whole,
)
from chatgot.launcher.entry import STOPS, escape_unwritable, guarded, refuse_wrong_settings, settle_environment
from chatgot.tuning.commands import add_checks
from chatgot.version import __version__

TRAIN_EPILOG = """overrides stand anywhere among the flags and edit the one home of a key:
  model.n_layers=4  data.tokenizer=byte  train.max_steps=200      the run YAML
  ds.optimizer.params.lr=3e-4  ds.chatgot.checkpoint.keep_last=5  the DeepSpeed JSON

exit codes: 0 done, 2 usage or configuration, 3 data, 4 checkpoint, 5 numerics, 6 environment, 75 interrupted and
saved, or the micro-batch made smaller because memory ran out: run the same command again"""


def train_parser() -> argparse.ArgumentParser:
    """Arguments of launch/train.py and `chatgot train`."""
    parser = RankParser(
        prog="train.py",
        description="Train a GPT on your own text with DeepSpeed.",
        epilog=TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    how = "how it is run: a DeepSpeed JSON, or the name of a shipped one (chatgot configs; default: by the device)"
    add("--deepspeed_config", metavar="NAME|JSON", help=how)
    config_argument(add, "what is trained: a preset (chatgot presets) or a run YAML")
    text = "a text file, a folder of them, a prepared folder, or a built-in corpus (default: wars_of_the_roses)"
    add("--data", default="wars_of_the_roses", metavar="SPEC", help=text)
    add("--out_dir", required=True, type=Path, help="the run folder")
    resume = "auto: go on from its newest checkpoint, else start (default)"
    add("--resume_from", default="auto", metavar="auto|must|never|PATH[@TAG]", help=resume)
    init = "a new run's model, weights and tokenizer: a folder of GPT-2 or Qwen3 in transformers' layout; a resume does"
    add("--init_from", metavar="DIR", help=f"{init} not read it")
    change = "resume with other data, or with another train.seed, which orders them; the run goes on at the same sample"
    add("--allow_data_change", action="store_true", help=f"{change} number")
    add("--allow_batch_change", action="store_true", help="resume with another train_batch_size")
    add("--strict", action="store_true", help="refuse where the DeepSpeed JSON deserves a warning")
    limit = "save and end with exit 75 after so many minutes (default: two minutes before the end of Slurm's job)"
    add("--max_minutes", type=duration, metavar="T", help=limit)
    hang = "end with exit 6 when a rank makes no progress for so many seconds, and say where all of them are"
    add("--hang_timeout", type=duration, default=300.0, metavar="S", help=f"{hang} (default: 300; 0: never)")
    lines = "of what is printed: text, with a bar on a terminal, or json, an object a line"
    add("--log_format", choices=("text", "json"), default="text", help=f"{lines} (default: text)")
    add("--run_name", help="name on the dashboard (default: the run folder's name)")
    add("--debug", action="store_true", help="show the traceback of a refusal")
    add("--local_rank", "--local-rank", type=int, help="set by launchers")
    add("--deepspeed", action="store_true", help="accepted from stock command lines; the engine is always DeepSpeed's")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="overrides, see below")
    return parser


def train(argv: Sequence[str] | None = None) -> None:
    """launch/train.py: train, and end the process with the exit code of the run."""
    _train(sys.argv[1:] if argv is None else argv, own_process=argv is None)


def _train(argv: Sequence[str], own_process: bool) -> NoReturn:
    from chatgot.training.stop import StopSignals

    arguments = train_parser().parse_args(argv)

    def program() -> NoReturn:
        with StopSignals(starting=True, out_dir=arguments.out_dir) as stop:
            if own_process:
                escape_unwritable()
                settle_environment(start_again=True)
            json = given_to(refuse_wrong_settings, arguments)
            from chatgot.training.run import TrainArguments, leave
            from chatgot.training.run import train as run

            code = run(replace(given_to(TrainArguments, arguments), deepspeed_config=json), stop)
        leave()
        sys.exit(code)

    def alone() -> bool:  # known only after the launcher's variables have been read
        return (os.environ.get("WORLD_SIZE") or "1") == "1"

    try:
        code = guarded(program, arguments.debug)  # returns after a refusal only
    except Exception:  # whatever it is: the other ranks wait in a collective, so this one must not linger
        if alone():
            raise
        traceback.print_exc()
        code = 1
    if not alone():
        # The process group is still joined, and destroying it needs all ranks. Torn down by the interpreter while
        # others go away, gloo's threads abort it (SIGABRT) in place of the exit code, and NCCL waits for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """The `chatgot` command."""
    own_process, argv = argv is None, list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if argv[0] == "help":
        argv = [*argv[1:2], "--help"]
    if argv[0] == "train":
        _train(argv[1:], own_process)
    if own_process:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # see settle_environment
    parser, commands = _parser()
    if argv[0] not in commands:
        if argv[0][:1] == "-":
            parser.parse_known_args(argv)
        close = meant(argv[0], (*commands, "help"))
        hint = f"; did you mean '{close}'?" if close else ""
        parser.error(f"{argv[0]}: no such command{hint} (there are: {', '.join(commands)})")
    arguments = commands[argv[0]].parse_args(argv[1:])
    if own_process:
        escape_unwritable()
    if own_process and argv[0] in ("sample", "chat", "serve", "export", "verify", "tune", "rehearse"):
        settle_environment(start_again=True)
    if "run" in arguments and "tag" in arguments:
        from chatgot.checkpoint.load import take_apart

        arguments.run, tag = take_apart(arguments.run)
        arguments.tag = arguments.tag or tag
    sys.exit(guarded(lambda: arguments.program(arguments), arguments.debug))


def _parser() -> tuple[argparse.ArgumentParser, dict[str, Parser]]:
    """Make the parser that shows what there is, and those of the commands."""
    what = "Train a GPT on your own text with DeepSpeed, and use it."
    more = "chatgot help COMMAND says more about one of them."
    parser = argparse.ArgumentParser(prog="chatgot", description=what, epilog=more)
    parser.add_argument("--version", action="version", version=f"chatgot {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, program: Program | str, help: str) -> Add:
        added = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        added.set_defaults(program=imported(program) if isinstance(program, str) else program)
        added.add_argument("--debug", action="store_true", help="show the traceback of a refusal")
        return added.add_argument

    commands.add_parser("train", help="train, in one process; the same as python launch/train.py", add_help=False)
    add = command("prepare", _prepare, "turn text into tokens on disk")
    add("text", nargs="+", metavar="TEXT", help="text files, folders of them, or a built-in corpus")
    add("--out", required=True, type=Path, help="the prepared folder, for --data")
    add("--init_from", metavar="DIR", help="for train --init_from DIR: with the tokenizer and context of that folder")
    config_argument(add, "its data section says how")
    add("overrides", nargs="*", metavar="KEY=VALUE", default=[], help=argparse.SUPPRESS)

    _add_inference(command)
    fed.add_commands(command)

    add = command("export", _export, "the model for transformers or llama.cpp")
    add("run", type=Path, metavar="RUN", help="the run folder, or one of its checkpoints")
    add("--to", required=True, type=Path, metavar="DIR", help="the folder to make")
    add("--format", default="transformers", choices=("transformers", "gguf"), help="default: transformers")
    add("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="type of the weights (default: fp32)")
    add("--tag", help="checkpoint to export (default: the newest)")
    add("--data", metavar="SPEC", help="the run's text, for the comparison (default: where the run had it)")

    add = command("verify", _verify, "check a run folder: files of every checkpoint, and the journal")
    add("run", type=Path, metavar="RUN", help="the run folder; it is only read, also while it trains")
    add("--replay", type=count, metavar="K", help="train K steps from a checkpoint again and compare with the journal")
    add("--tag", help="check this checkpoint only, and replay from it (default: all; the oldest with K steps after it)")

    add = command("status", _status, "what became of a run: exit code 0 finished, 10 running, 75 run it again")
    add("run", type=Path, metavar="RUN", help="the run folder; it is only read")

    what = "the curves, events, samples and costs of runs in one HTML file"
    add = command("report", "chatgot.observe.report:report_or_show", what)
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, also while it trains; several are compared")
    add("--out", type=Path, metavar="FILE", help="default: report.html in the run folder, or of several runs here")
    add("--terminal", action="store_true", help="show it in the terminal instead of writing a file")
    add("--follow", action="store_true", help="in the terminal, again and again until the run ends")

    add_checks(command)

    what = "run everything once with a small model on this CPU, before the queue does"
    add = command("rehearse", "chatgot.rehearse.rehearsal:rehearse", what)
    add("deepspeed_config", type=Path, metavar="JSON", help="the run's DeepSpeed JSON, or the name of a shipped one")
    config_argument(add, "the run's preset or YAML")
    add("--data", default="wars_of_the_roses", metavar="SPEC", help="the run's text, as for train")
    add("--nproc", type=count, default=2, metavar="N", help="ranks, as many as the run will have (default: 2)")
    add("--out_dir", type=Path, metavar="DIR", help="the run's folder: the rehearsal writes beside it, not into it")
    add("--full", action="store_true", help="then train the real model for two steps on this machine's devices")
    overrides_argument(add)

    command("presets", _presets, "list the models that ship, for --config")
    command("configs", _configs, "list the DeepSpeed JSONs that ship, for --deepspeed_config")
    return parser, commands.choices


def _add_inference(command: Command) -> None:
    """Add the commands that turn a run folder into text."""

    def model(add: Add) -> None:
        add("run", type=Path, metavar="RUN", help="the run folder, or one of its checkpoints")
        add("--tag", help="checkpoint to use (default: the newest)")
        add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: cuda where there is one")
        what = "mark passages of K characters or more that stand in the training text, and say where and what fed them"
        add("--mark_copied", type=count, nargs="?", const=40, metavar="K", help=f"{what} (default K: 40)")
        add("--data", metavar="SPEC", help="the training text, for --mark_copied (default: where the run had it)")

    def drawing(add: Add, max_new_tokens: int) -> None:
        model(add)
        add("--max_new_tokens", type=int, default=max_new_tokens, help=f"tokens to draw (default: {max_new_tokens})")
        add("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
        add("--top_k", type=int, help="draw from the k likeliest tokens only")
        add("--top_p", type=float, help="draw from the likeliest tokens that make up this probability")
        add("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")

    add = command("sample", "chatgot.inference.sample:sample", "draw text from a run folder")
    drawing(add, max_new_tokens=256)
    add("--prompt", help="text to continue (default: the run's first sample prompt)")
    add("--num_samples", type=int, default=1, help="continuations to draw (default: 1)")
    add("--greedy", action="store_true", help="always take the likeliest token")

    add = command("chat", "chatgot.inference.chat:chat", "write a text in turns with a run's model, in the terminal")
    drawing(add, max_new_tokens=200)

    what = "a page and OpenAI's completions for a run's model, on this machine"
    add = command("serve", "chatgot.inference.serve:serve", what)
    model(add)
    add("--host", default="127.0.0.1", help="address to listen on; any but this machine's own demands a token")
    add("--port", type=whole(0, 65535), default=0, help="0: any free one (default)")
    add("--allow_host", action="append", default=[], metavar="NAME", help="another name that it is reached by")
    add("--streams", type=count, default=16, metavar="N", help="texts in one forward (default: 16)")
    add("--queue", type=count, default=64, metavar="N", help="texts that may wait; then 429 (default: 64)")
    add("--max_tokens", type=count, default=4096, metavar="N", help="tokens of a reply at most (default: 4096)")
    add("--max_seconds", type=duration, default=300.0, metavar="S", help="of a request, waiting too (default: 300)")
    add("--max_body", type=count, default=1 << 20, metavar="BYTES", help="of a request (default: 1 MiB)")


def _prepare(arguments: argparse.Namespace) -> None:
    from chatgot.config.overrides import parse_overrides
    from chatgot.config.run import load_run_config
    from chatgot.data.prepare import prepare
    from chatgot.observe.progress import show_log

    show_log()
    overrides, tokenizer = parse_overrides(arguments.overrides)[0], None
    if arguments.init_from is None:
        config = load_run_config(arguments.config, overrides)
    else:
        from chatgot.exchange.tokenizer import config_and_tokenizer

        config, tokenizer, _ = config_and_tokenizer(Path(arguments.init_from), arguments.config, overrides)
    block = config.model.max_seq_length
    prepared = prepare(arguments.text, arguments.out, config.data, block_size=block, tokenizer=tokenizer)
    print(f"prepared {prepared.path}: use it with --data {prepared.path}")


def _export(arguments: argparse.Namespace) -> None:
    from chatgot.exchange.export import ExportArguments, export
    from chatgot.observe.progress import show_log

    show_log()
    export(given_to(ExportArguments, arguments))


def _verify(arguments: argparse.Namespace) -> int:
    from chatgot.verify.verify import verify

    whole = verify(arguments.run, arguments.tag)
    if arguments.replay is not None:
        from chatgot.verify.replay import replay

        whole = replay(arguments.run, arguments.replay, arguments.tag) and whole
    return EXIT_DONE if whole else EXIT_CHECKPOINT


def _status(arguments: argparse.Namespace) -> int:
    from chatgot.observe.status import status

    said, code = status(arguments.run)
    print(f"{arguments.run}: {said}")
    return code


def _presets(arguments: argparse.Namespace) -> None:
    from chatgot.config.run import load_run_config, preset_names
    from chatgot.model.shapes import count_parameters

    rows = [("PRESET", "ARCHITECTURE", "PARAMETERS", "WIDTH x LAYERS x HEADS", "CONTEXT", "TOKENIZER")]
    for name in preset_names():
        config = load_run_config(name)
        model, data = config.model, config.data
        parameters = count_parameters(model, data.bpe_vocab_size if data.tokenizer == "bpe" else 95)
        shape = f"{model.d_model} x {model.n_layers} x {model.n_head}"
        rows.append((name, model.architecture, f"{parameters:,}", shape, f"{model.max_seq_length}", data.tokenizer))
    _print_table(rows)
    print("parameters: with the tokenizer's vocabulary for bpe, with 95 characters for char")


def _configs(arguments: argparse.Namespace) -> None:
    from chatgot.deepspeed_json.read import shipped_table

    _print_table([("CONFIG", "PRECISION", "ZERO", "USE IT WHEN"), *shipped_table()])


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows, the first of which is the head, as columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())
