"""Command lines of `chatgot sample`, `chat` and `serve`. Imports no torch before a command runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from chatgot.errors import CheckpointError
from chatgot.launcher.arguments import Add, Command, count, duration, given_to


def add_commands(command: Command) -> None:
    """Add the commands that turn a run folder into text."""
    add = command("sample", _sample, "draw text from a run folder")
    _common(add, max_new_tokens=256)
    add("--prompt", help="text to continue (default: the run's first sample prompt)")
    add("--num_samples", type=int, default=1, help="continuations to draw (default: 1)")
    add("--greedy", action="store_true", help="always take the likeliest token")

    add = command("chat", _chat, "write a text in turns with a run's model, in the terminal")
    _common(add, max_new_tokens=200)

    add = command("serve", _serve, "a page and OpenAI's completions for a run's model, on this machine")
    _model(add)
    add("--host", default="127.0.0.1", help="address to listen on; any but this machine's own demands a token")
    add("--port", type=int, default=0, help="0: any free one (default)")
    add("--allow_host", action="append", default=[], metavar="NAME", help="another name that it is reached by")
    add("--streams", type=count, default=16, metavar="N", help="texts in one forward (default: 16)")
    add("--queue", type=count, default=64, metavar="N", help="texts that may wait; then 429 (default: 64)")
    add("--max_tokens", type=count, default=4096, metavar="N", help="tokens of a reply at most (default: 4096)")
    add("--max_seconds", type=duration, default=300.0, metavar="S", help="of a request, waiting too (default: 300)")
    add("--max_body", type=count, default=1 << 20, metavar="BYTES", help="of a request (default: 1 MiB)")
    copies_arguments(add)


def _model(add: Add) -> None:
    add("run", type=Path, metavar="RUN", help="the run folder, or one of its checkpoints")
    add("--tag", help="checkpoint to use (default: the newest)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: cuda where there is one")


def _common(add: Add, max_new_tokens: int) -> None:
    _model(add)
    add("--max_new_tokens", type=int, default=max_new_tokens, help=f"tokens to draw (default: {max_new_tokens})")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    add("--top_k", type=int, help="draw from the k likeliest tokens only")
    add("--top_p", type=float, help="draw from the likeliest tokens that make up this probability")
    add("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    copies_arguments(add)


def copies_arguments(add: Add) -> None:
    """Add --mark_copied and --data to a command that shows what a model wrote."""
    what = "mark passages of K characters or more that stand in the training text, and say where and what fed them"
    add("--mark_copied", type=count, nargs="?", const=40, metavar="K", help=f"{what} (default K: 40)")
    add("--data", metavar="SPEC", help="the training text, for --mark_copied (default: where the run had it)")


def name_checkpoint(arguments: argparse.Namespace) -> None:
    """Understand a checkpoint's path in place of the run folder and --tag."""
    from chatgot.checkpoint.load import take_apart

    arguments.run, tag = take_apart(arguments.run)
    arguments.tag = arguments.tag or tag


def _find_run(arguments: argparse.Namespace) -> None:
    name_checkpoint(arguments)
    if not arguments.run.is_dir():
        raise CheckpointError(f"{arguments.run}: no folder, and no complete checkpoint; give the --out_dir of a run")


def _sample(arguments: argparse.Namespace) -> None:
    _find_run(arguments)
    from chatgot.inference.sample import SampleArguments, sample

    sample(given_to(SampleArguments, arguments))


def _chat(arguments: argparse.Namespace) -> None:
    _find_run(arguments)
    from chatgot.inference.chat import ChatArguments, chat

    chat(given_to(ChatArguments, arguments))


def _serve(arguments: argparse.Namespace) -> None:
    _find_run(arguments)
    from chatgot.inference.serve import ServeArguments, serve

    serve(given_to(ServeArguments, arguments))
