"""The run YAML: *what* is trained, on what, for how long. Presets live in chatgot/presets/."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chatgot.deepspeed_json.fields import (
    coerce,
    did_you_mean,
    ranged,
    read_section,
)
from chatgot.errors import ConfigError

PRESETS = Path(__file__).resolve().parent.parent / "presets"


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the GPT. The vocabulary size is the tokenizer's and never stands in a file."""

    architecture: Literal["gpt2", "modern"] = "modern"
    """gpt2: LayerNorm, learned positions, GELU, biases. modern: RMSNorm, rotary positions, QK-norm, SwiGLU, no
    biases.
    """
    d_model: int = ranged(384, low=1)
    """Width of the residual stream."""
    n_layers: int = ranged(6, low=1)
    """Number of transformer blocks."""
    n_head: int = ranged(6, low=1)
    """Attention heads; d_model must be a multiple of it."""
    n_kv_head: int | None = ranged(None, low=1)
    """Key/value heads (grouped-query attention, modern only); null means n_head."""
    d_hid: int = ranged(1536, low=1)
    """Inner width of the feed-forward layer."""
    max_seq_length: int = ranged(256, low=1)
    """Tokens per training sample, and the longest context the model sees."""
    dropout: float = ranged(0.0, low=0.0, high=0.99)
    """Probability of dropping embeddings, attention weights and block outputs during training."""
    tie_embeddings: bool = True
    """Whether the output head shares the token embedding's matrix."""
    rope_theta: float = ranged(10000.0, above=0.0)
    """Base of the rotary frequencies (modern only)."""
    init_std: float = ranged(0.02, above=0.0)
    """Standard deviation of the initial weights; block outputs are scaled by 1/sqrt(2 n_layers) (GPT-2)."""
    zero_init_projections: bool = False
    """Start both output projections of every block at zero (modded-nanogpt), instead of the scaled normal."""

    def __post_init__(self) -> None:
        if self.d_model % self.n_head:
            raise ValueError(f"d_model = {self.d_model} is not a multiple of n_head = {self.n_head}")
        if self.architecture == "gpt2" and self.n_kv_head not in (None, self.n_head):
            raise ValueError(f"n_kv_head = {self.n_kv_head}: grouped key/value heads need architecture: modern")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head = {self.n_head} is not a multiple of n_kv_head = {self.n_kv_head}")
        if self.architecture == "modern" and (self.d_model // self.n_head) % 2:
            raise ValueError(f"d_model / n_head = {self.d_model // self.n_head} must be even for rotary positions")

    @property
    def kv_heads(self) -> int:
        """Key/value heads in use."""
        return self.n_kv_head or self.n_head


@dataclass(frozen=True)
class DataConfig:
    """How text becomes tokens. Which text it is stands on the command line (--data)."""

    tokenizer: Literal["char", "byte", "bpe"] = "char"
    """char: every distinct character of the text; byte: 256 UTF-8 bytes; bpe: trained on the training split."""
    bpe_vocab_size: int = ranged(4096, low=257, high=65536)
    """Vocabulary that the bpe tokenizer is trained to (bpe only)."""
    unknown_characters: Literal["error", "skip"] = "error"
    """What to do with characters the vocabulary never saw (text added after the vocabulary was made): refuse, or leave
    out and count.
    """
    val_fraction: float = ranged(0.1, above=0.0, high=0.9)
    """Share of the text, at its end, that is held out for validation."""
    test_fraction: float = ranged(0.0, low=0.0, high=0.9)
    """Share of the text, after the validation part, that is never looked at in training."""
    split_by: Literal["auto", "position", "file"] = "auto"
    """position: cut the joined text; file: whole files; auto: by file where a boundary is within 20 % of the wished
    size.
    """
    encoding: str = "utf-8"
    """Encoding of the text files."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, and what is looked at on the way. How it is run (batch, lr, precision, saving) is in the DeepSpeed
    JSON.
    """

    max_steps: int = ranged(1000, low=1)
    """Optimizer steps in all; the learning-rate schedule ends here."""
    seed: int = ranged(1337, low=0)
    """Seeds the initial weights, the data order and dropout."""
    log_every: int = ranged(10, low=1)
    """Optimizer steps between lines of the journal and the log."""
    eval_every: int | None = ranged(250, low=1)
    """Optimizer steps between passes over the whole validation split; null: only at the end."""
    sample_every: int | None = ranged(500, low=1)
    """Optimizer steps between samples; null: only at the end."""
    sample_prompts: tuple[str, ...] = ("\n",)
    """Prompts of the samples, shared out over the ranks."""
    sample_max_new_tokens: int = ranged(256, low=1)
    """Length of a sample in tokens."""
    sample_temperature: float = ranged(0.8, low=0.0)
    """Sampling temperature; 0 is greedy."""
    sample_top_k: int | None = ranged(None, low=1)
    """Sample from the k likeliest tokens only; null: all."""
    sample_seed: int = ranged(42, low=0)
    """Seed of the samples; it never touches the training random state."""
    sample_stop: str | None = None
    """Text that ends a sample early; null: none."""


@dataclass(frozen=True)
class RunConfig:
    """The whole run YAML."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain, YAML-ready form with every key, also those left at their default."""
        plain = dataclasses.asdict(self)
        plain["train"]["sample_prompts"] = list(self.train.sample_prompts)
        return plain


def preset_names() -> list[str]:
    """Names accepted by --config, beside paths."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def load_run_config(name_or_path: str, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a preset or a YAML file and apply overrides.

    Args:
        name_or_path: a preset's name or a path that ends in .yaml or .yml.
        overrides: {'model.n_layers': 4, 'train.max_steps': 200}, from the command line.

    Raises:
        ConfigError: no such preset or file, YAML that cannot be read, unknown or mistyped keys.
    """
    import yaml

    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = PRESETS / f"{name_or_path}.yaml"
        if not path.exists():
            names = preset_names()
            raise ConfigError(
                f"--config {name_or_path}: no such preset{did_you_mean(name_or_path, names)} "
                f"(presets: {', '.join(names)}; a file's name ends in .yaml)"
            )
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {error}") from error
    try:
        tree = yaml.load(text, Loader=_unique_key_loader())
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}") from error
    return build_run_config(tree, str(path), overrides)


def build_run_config(tree: Any, where: str, overrides: dict[str, Any] | None = None) -> RunConfig:
    """A RunConfig from a parsed YAML tree; see `load_run_config`."""
    tree = (
        {k: dict(v) if isinstance(v, dict) else v for k, v in (tree or {}).items()}
        if isinstance(tree, dict) or tree is None
        else tree
    )
    for dotted, value in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        known = {
            f"{s.name}.{f.name}" for s in dataclasses.fields(RunConfig) for f in dataclasses.fields(_SECTIONS[s.name])
        }
        if dotted not in known:
            close = difflib.get_close_matches(dotted, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ConfigError(f"override {dotted}={value}: no such key{hint}")
        target = tree.setdefault(section, {})
        if target is None:
            target = tree[section] = {}
        target[key] = value
    return read_section(RunConfig, tree, where)


_SECTIONS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}


def _unique_key_loader() -> type:
    """yaml.SafeLoader that refuses a key given twice, which plain YAML loaders let the later one win in silence."""
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=deep)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key '{key}' is given twice", key_node.start_mark
                    )
                seen.add(key)
            return super().construct_mapping(node, deep)

    return UniqueKeyLoader


__all__ = [
    "DataConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "build_run_config",
    "coerce",
    "load_run_config",
    "preset_names",
]
