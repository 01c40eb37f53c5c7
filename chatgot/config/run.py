"""The run YAML: *what* is trained, on what, for how long. Presets live in chatgot/presets/."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

import chatgot.run_folder as run_folder
from chatgot.deepspeed_json.findings import Findings, Mark, meant, shortened
from chatgot.deepspeed_json.settings import Number, Settings, Texts, Whole, read_section
from chatgot.errors import ConfigError

PRESETS = Path(__file__).resolve().parent.parent / "presets"


class ModelConfig(Settings):
    """Shape of the GPT. The vocabulary size is the tokenizer's and never stands in a file."""

    architecture: Literal["gpt2", "modern"] = "modern"
    """gpt2: LayerNorm, learned positions, GELU, biases. modern: RMSNorm, rotary positions, QK-norm, SwiGLU, no bias."""
    d_model: Whole = Field(default=384, ge=1)
    """Width of the residual stream."""
    n_layers: Whole = Field(default=6, ge=1)
    """Number of transformer blocks."""
    n_head: Whole = Field(default=6, ge=1)
    """Attention heads; d_model must be a multiple of it, unless head_dim is given."""
    n_kv_head: Whole | None = Field(default=None, ge=1)
    """Key/value heads (grouped-query attention, modern only); null means n_head."""
    head_dim: Whole | None = Field(default=None, ge=1)
    """Width of one attention head (modern only); null means d_model / n_head."""
    d_hid: Whole = Field(default=1536, ge=1)
    """Inner width of the feed-forward layer."""
    max_seq_length: Whole = Field(default=256, ge=1)
    """Tokens per training sample, and the longest context the model sees."""
    dropout: Number = Field(default=0.0, ge=0.0, le=0.99)
    """Probability of dropping embeddings, attention weights and block outputs during training."""
    tie_embeddings: bool = True
    """Whether the output head shares the token embedding's matrix."""
    rope_theta: Number = Field(default=10000.0, gt=0.0)
    """Base of the rotary frequencies (modern only)."""
    norm_eps: Number | None = Field(default=None, gt=0.0)
    """Added to the variance in every norm; null means 1e-6 (modern) or 1e-5 (gpt2)."""
    init_std: Number = Field(default=0.02, gt=0.0)
    """Standard deviation of the initial weights; block outputs are scaled by 1/sqrt(2 n_layers) (GPT-2)."""
    zero_init_projections: bool = False
    """Start both output projections of every block at zero (modded-nanogpt), instead of the scaled normal."""

    @model_validator(mode="after")
    def _goes_together(self) -> ModelConfig:
        if self.head_dim is None and self.d_model % self.n_head:
            raise ValueError(f"d_model = {self.d_model} is not a multiple of n_head = {self.n_head}")
        if self.architecture == "gpt2" and self.attention_width != self.d_model:
            raise ValueError(f"head_dim = {self.head_dim}: heads of another width need architecture: modern")
        if self.architecture == "gpt2" and self.n_kv_head not in (None, self.n_head):
            raise ValueError(f"n_kv_head = {self.n_kv_head}: grouped key/value heads need architecture: modern")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head = {self.n_head} is not a multiple of n_kv_head = {self.n_kv_head}")
        if self.architecture == "modern" and self.head_width % 2:
            name = "d_model / n_head" if self.head_dim is None else "head_dim"
            raise ValueError(f"{name} = {self.head_width} must be even for rotary positions")
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads in use."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Width of one attention head in use."""
        return self.head_dim or self.d_model // self.n_head

    @property
    def attention_width(self) -> int:
        """Width of all heads' queries, and of what attention gives."""
        return self.n_head * self.head_width

    @property
    def epsilon(self) -> float:
        """What every norm adds to the variance."""
        return self.norm_eps or (1e-5 if self.architecture == "gpt2" else 1e-6)


class DataConfig(Settings):
    """How text becomes tokens. Which text it is stands on the command line (--data)."""

    tokenizer: Literal["char", "byte", "bpe", "given"] = "char"
    """char: every distinct character of the text; byte: 256 UTF-8 bytes; bpe: trained on the training split; given: the
    one of the folder which --init_from names, afterwards the run folder's.
    """
    bpe_vocab_size: Whole = Field(default=4096, ge=257, le=65536)
    """Vocabulary that the bpe tokenizer is trained to (bpe only)."""
    unknown_characters: Literal["error", "skip"] = "error"
    """Characters that the vocabulary lacks (text added after it was made): refuse, or leave out and count."""
    val_fraction: Number = Field(default=0.1, gt=0.0, le=0.9)
    """Share of the text, at its end, that is held out for validation."""
    test_fraction: Number = Field(default=0.0, ge=0.0, le=0.9)
    """Share of the text, after the validation part, that is never looked at in training."""
    split_by: Literal["auto", "position", "file"] = "auto"
    """position: cut the joined text; file: whole files; auto: file, where that misses the size by at most 20 %."""
    encoding: str = "utf-8"
    """Encoding of the text files."""


class TrainConfig(Settings):
    """How long, and what is looked at on the way. Batch, lr, precision and saving are in the DeepSpeed JSON."""

    max_steps: Whole = Field(default=1000, ge=1)
    """Optimizer steps in all; the learning-rate schedule ends here."""
    seed: Whole = Field(default=1337, ge=0)
    """Seeds the initial weights, the data order and dropout."""
    log_every: Whole = Field(default=10, ge=1)
    """Optimizer steps between lines of the journal and the log."""
    eval_every: Whole | None = Field(default=250, ge=1)
    """Optimizer steps between passes over the validation split; null: only at the end."""
    eval_tokens: Whole = Field(default=10_000_000, ge=1)
    """Tokens of a pass at most. A larger split is seen in windows at even distances, always the same ones."""
    sample_every: Whole | None = Field(default=500, ge=1)
    """Optimizer steps between samples; null: only at the end."""
    sample_prompts: Texts = ("\n",)
    """Prompts of the samples, shared out over the ranks."""
    sample_max_new_tokens: Whole = Field(default=256, ge=1)
    """Length of a sample in tokens."""
    sample_temperature: Number = Field(default=0.8, ge=0.0)
    """Sampling temperature; 0 is greedy."""
    sample_top_k: Whole | None = Field(default=None, ge=1)
    """Sample from the k likeliest tokens only; null: all."""
    sample_seed: Whole = Field(default=42, ge=0)
    """Seed of the samples; it never touches the training random state."""
    sample_stop: str | None = None
    """Text that ends a sample early; null: none."""


class RunConfig(Settings):
    """The whole run YAML."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    def to_dict(self) -> dict[str, Any]:
        """Plain, YAML-ready form with every key, also those left at their default.

        Keys that came later are left out where they are null: runs without them keep their settings' hashes.
        """
        tree = self.model_dump(mode="json")
        for key in ("head_dim", "norm_eps"):
            if tree["model"][key] is None:
                del tree["model"][key]
        return tree


def preset_names() -> list[str]:
    """Names accepted by --config, beside paths."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def load_run_config(
    name_or_path: str, overrides: dict[str, Any] | None = None, model: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read a preset or a YAML file and apply overrides.

    Args:
        name_or_path: a preset's name or a path that ends in .yaml or .yml.
        overrides: {'model.n_layers': 4, 'train.max_steps': 200}, from the command line.
        model: what takes the place of its model section, before the overrides.

    Raises:
        ConfigError: no such preset or file, YAML that cannot be read; or all unknown keys and wrong values in it.
    """
    import yaml

    path = Path(name_or_path)
    if path.suffix == ".json":
        raise ConfigError(f"--config {path}: a DeepSpeed JSON by its name, which --deepspeed_config takes; give a YAML")
    if path.suffix not in (".yaml", ".yml"):
        path = PRESETS / f"{name_or_path}.yaml"
        if not path.exists():
            close = meant(name_or_path, preset_names())
            hint = f"; did you mean '{close}'?" if close else ""
            raise ConfigError(
                f"--config {name_or_path}: no such preset{hint} (presets: {', '.join(preset_names())}; "
                "a file's name ends in .yaml)"
            )
    try:
        if path.is_file() and path.stat().st_size > run_folder.LARGEST:
            raise ConfigError(f"--config {path}: more than {run_folder.LARGEST} bytes, which no run YAML has")
        tree, marks = _parse(run_folder.read_bytes(path, follow=True).decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        raise ConfigError(f"--config {path}: not valid YAML: {shortened(str(error), 300)}") from error
    if model is not None and isinstance(tree, dict):
        tree["model"] = dict(model)
    return build_run_config(tree, str(path), overrides, marks)


def build_run_config(
    tree: Any, where: str, overrides: dict[str, Any] | None = None, marks: Mapping[str, Mark] | None = None
) -> RunConfig:
    """Make a RunConfig from a parsed YAML tree; see `load_run_config`.

    Args:
        where: the file's name in messages.
        marks: the place of each section and key in the file.
    """
    tree, overrides = {} if tree is None else tree, overrides or {}
    for dotted, value in overrides.items():
        section, _, key = dotted.partition(".")
        keys = tree.get(section) if isinstance(tree, dict) else ()
        if keys is None or isinstance(keys, dict):  # else it is refused below
            tree = {**tree, section: {**(keys or {}), key: value}}
    return read_section(RunConfig, tree, Findings(where, frozenset(overrides), marks or {}))


def _parse(text: str) -> tuple[Any, dict[str, Mark]]:
    """Parse YAML, and find the place of each section and key. A key given twice is an error here."""
    import yaml

    marks: dict[str, Mark] = {}

    def visit(node: yaml.Node | None, section: str = "") -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            name = f"{section}{key.value}"
            if name in marks:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is given twice", key.start_mark)
            marks[name] = Mark(key.start_mark.line + 1, key.start_mark.column + 1)
            if not section:
                visit(value, f"{name}.")

    loader = yaml.SafeLoader(text)
    loader.flatten_mapping = lambda node: None  # "<<: *other" would let a key be given twice
    root = loader.get_single_node()
    visit(root)
    return loader.construct_document(root) if root is not None else None, marks
