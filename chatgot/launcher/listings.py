"""Tables of what ships: `chatgot presets` and `chatgot configs`."""

from __future__ import annotations

from collections.abc import Sequence

from chatgot.config.run import load_run_config, preset_names
from chatgot.deepspeed_json.read import shipped_table
from chatgot.model.shapes import count_parameters


def presets() -> None:
    """Print the models that ship."""
    rows = [("PRESET", "ARCHITECTURE", "PARAMETERS", "WIDTH x LAYERS x HEADS", "CONTEXT", "TOKENIZER")]
    for name in preset_names():
        config = load_run_config(name)
        model, data = config.model, config.data
        count = count_parameters(model, data.bpe_vocab_size if data.tokenizer == "bpe" else 95)
        shape = f"{model.d_model} x {model.n_layers} x {model.n_head}"
        rows.append((name, model.architecture, f"{count:,}", shape, f"{model.max_seq_length}", data.tokenizer))
    _print_table(rows)
    print("parameters: with the tokenizer's vocabulary for bpe, with 95 characters for char")


def configs() -> None:
    """Print the DeepSpeed JSONs that ship."""
    _print_table([("CONFIG", "PRECISION", "ZERO", "USE IT WHEN"), *shipped_table()])


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows, the first of which is the head, as columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())
