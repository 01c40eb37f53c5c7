"""Tokens per second of sampling: against transformers' generate on the same weights, and many streams against one.

All sides take turns in one process. The model is exported as `chatgot export` does it, and both draw at temperature 1.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Sequence
from typing import Any

from chatgot.bench.measuring import describe_machine, print_head, print_row, spread, suite_parser, take_turns, timed
from chatgot.config.run import ModelConfig


def main(argv: Sequence[str] | None = None) -> int:
    """The suite `generate`."""
    parser = suite_parser("generate", __doc__)
    add = parser.add_argument
    add("--layers", type=int, default=8)
    add("--d_model", type=int, default=384)
    add("--n_head", type=int, default=6)
    add("--max_seq_length", type=int, default=256)
    add("--vocab_size", type=int, default=96)
    add("--architecture", choices=("gpt2", "modern"), default="gpt2")
    add("--prompt", type=int, default=16, help="tokens of the prompt (default: 16)")
    add("--new_tokens", type=int, default=100, help="tokens to draw (default: 100)")
    add("--batches", type=int, nargs="+", default=[1, 16])
    add("--streams", type=int, default=16, help="texts of the server's batch (default: 16)")
    add("--turns", type=int, default=5)
    arguments = parser.parse_args(argv)
    import torch

    from chatgot.inference.batching import Batch
    from chatgot.model.generate import generate
    from chatgot.model.gpt import GPT

    d_model = arguments.d_model
    config = ModelConfig(
        architecture=arguments.architecture,
        d_model=d_model,
        n_layers=arguments.layers,
        n_head=arguments.n_head,
        d_hid=4 * d_model,
        max_seq_length=arguments.max_seq_length,
    )
    ours = GPT(config, arguments.vocab_size)
    ours.init_weights(0)
    ours.eval()
    theirs = _exported(ours)
    new, draw = arguments.new_tokens, torch.Generator().manual_seed(0)
    sides: dict[str, Callable[[], float]] = {}
    for rows in arguments.batches:
        ids = torch.randint(arguments.vocab_size, (rows, arguments.prompt), generator=draw)
        greedy = generate(ours, ids, new, temperature=0.0)
        asked: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "use_cache": True, "pad_token_id": 0}
        asked |= {"eos_token_id": None, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            same = theirs.generate(ids, do_sample=False, **asked)[:, arguments.prompt :].tolist()
        print(f"batch {rows}: greedy tokens equal: {greedy == same}")
        sides[f"{rows} chatgot"] = lambda ids=ids: timed(lambda: generate(ours, ids, new))

        def sample(ids: torch.Tensor = ids, asked: dict[str, Any] = asked) -> None:
            with torch.inference_mode():
                theirs.generate(ids, do_sample=True, top_k=0, **asked)

        sides[f"{rows} transformers"] = lambda sample=sample: timed(sample)
    prompts = torch.randint(arguments.vocab_size, (arguments.streams, arguments.prompt), generator=draw).tolist()
    batch = Batch(ours, arguments.streams, arguments.streams)
    sides["streams at once"] = lambda: timed(lambda: _continue(batch, prompts, new))
    sides["streams one by one"] = lambda: timed(lambda: [_continue(batch, [prompt], new) for prompt in prompts])
    print(f"{describe_machine()}; {arguments.turns} turns")
    measured = take_turns(sides, arguments.turns + 1)
    seconds = {name: values[1:] for name, values in measured.items()}  # the first turn warms up
    print_head("texts", "side", "tokens/s", "other / this time", "10 % .. 90 % of the turns")
    pairs = [(rows, f"{rows} chatgot", f"{rows} transformers") for rows in arguments.batches]
    for rows, fast, slow in [*pairs, (arguments.streams, "streams at once", "streams one by one")]:
        ratios = [other / this for this, other in zip(seconds[fast], seconds[slow])]
        median, low, high = spread(ratios)
        for name, cell in ((slow, "1.00"), (fast, f"**{median:.2f}**")):
            rate = rows * new / statistics.median(seconds[name])
            print_row(str(rows), name, f"{rate:.0f}", cell, f"{low:.2f} .. {high:.2f}" if name == fast else "")
    batch.close()
    return 0


def _exported(ours: Any) -> Any:
    """The same weights in transformers' class, by the table of `chatgot export`."""
    import transformers

    from chatgot.exchange.layout import transformers_config, transformers_parts

    tree, weights = transformers_config(ours.config, ours.vocab_size, "float32"), ours.state_dict()
    kind = getattr(transformers, tree["architectures"][0])
    theirs = kind(kind.config_class(**tree))
    exported = {}
    for part in transformers_parts(ours.config, ours.vocab_size):
        rows = weights[part.ours][part.start : part.start + part.rows]
        exported[part.name] = rows.T if part.transposed else rows
    missing, unexpected = theirs.load_state_dict(exported, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    return theirs.eval()


def _continue(batch: Any, prompts: Sequence[list[int]], new: int) -> None:
    """Continue all of them at once, and wait for the end."""
    from chatgot.inference.batching import Generation

    left, done = [len(prompts)], threading.Event()

    def end(_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            done.set()

    batch.submit(
        [Generation(prompt, new, lambda token, others: False, end, seed=i) for i, prompt in enumerate(prompts)]
    )
    done.wait()
