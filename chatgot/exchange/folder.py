"""A folder in transformers' layout, read without torch and without running anything of it: which model it holds, and
where each tensor stands. Whatever does not fit is refused by its key, its file or its tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from chatgot.config.run import ModelConfig, RunConfig, load_run_config
from chatgot.deepspeed_json.findings import Findings
from chatgot.deepspeed_json.settings import read_section
from chatgot.errors import CheckpointError, ConfigError, quoted
from chatgot.exchange.layout import CLASSES, DROPOUTS, FIXED, KEYS, OUTSIDE, SHARED_KEYS, Part, transformers_parts
from chatgot.run_folder import read_bytes

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_CONFIG = 1 << 20
LARGEST_INDEX = 64 << 20
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
"""Names of files that may run code when they are read."""
BESIDE = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")
"""What transformers' Trainer leaves beside the weights: nothing of it is read."""
TYPES = ("F32", "F16", "BF16")
FREE = ("max_seq_length", "dropout", "init_std", "zero_init_projections")
"""Keys of `model:` that may differ from the folder's: a shorter context, and what says nothing about its tensors."""
BARE = ("GPT2Model", "Qwen3Model")
"""The classes without an output head; a tied one needs none."""
PREFIX = {"gpt2": "transformer.", "modern": "model."}
"""Before the names of all but the output head; a folder of the model without its head has none."""
BUFFERS = ("*.attn.bias", "*.attn.masked_bias", "*.rotary_emb.inv_freq")
"""Constants that older files hold too, under the names with PREFIX."""
IGNORED = {
    *("_name_or_path", "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "vocab_size"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "return_dict", "output_hidden_states"),
    *("output_attentions", "is_encoder_decoder", "id2label", "label2id", "problem_type", "chunk_size_feed_forward"),
    *("n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
    *("summary_first_dropout", "task_specific_params", "max_window_layers", "sliding_window"),
}
"""Keys of config.json that say nothing about what is computed."""


@dataclass(frozen=True)
class Folder:
    """What `open_folder` found."""

    path: Path
    model: ModelConfig
    """At the folder's full context."""
    vocab_size: int
    tensors: dict[str, tuple[Path, str]]
    """Name of an exported tensor -> its file, and its name in that."""
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> Sequence[Part]:
        """Every tensor that our model is made of."""
        return list(transformers_parts(self.model, self.vocab_size))


def open_folder(path: Path) -> Folder:
    """Find out what a folder holds, and see to it that our model computes the same with it.

    Raises:
        CheckpointError: no such folder, or the first thing that does not fit.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give one in transformers' layout, with {CONFIG} and {WEIGHTS}")
    names = sorted(one.name for one in path.iterdir())
    pickles = [name for name in names if any(fnmatch(name.lower(), one) for one in PICKLES)]
    left = [name for name in pickles if not any(fnmatch(name, one) for one in BESIDE)]
    if left and not {WEIGHTS, INDEX} & set(names):
        raise CheckpointError(
            f"{path / left[0]}: a pickle, which can run code when it is read; weights are read from {WEIGHTS} only: "
            f"convert the folder with save_pretrained of transformers"
        )
    tree = read_json(path / CONFIG, LARGEST_CONFIG)
    asking = {CONFIG: tree}
    if "tokenizer_config.json" in names:
        asking["tokenizer_config.json"] = read_json(path / "tokenizer_config.json", LARGEST_INDEX)
    for name, one in asking.items():
        if one.get("auto_map"):
            raise CheckpointError(f"{path / name}: auto_map = {quoted(one['auto_map'])}: asks for code of the folder")
    model, vocab_size, notes = read_config(tree, path / CONFIG)
    if left:
        notes.append(f"{path}: {', '.join(map(quoted, left))}: pickles, which are not read; the safetensors are taken")
    folder = Folder(path, model, vocab_size, _tensors(path, model, names), tuple(notes))
    _compare(folder)
    return folder


def read_json(path: Path, largest: int, missing: str = "is its folder in transformers' layout?") -> dict[str, Any]:
    """Read a mapping. Raises CheckpointError; `missing`: what is said where there is no file."""
    try:
        tree = json.loads(read_bytes(path, largest, follow=True))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {missing}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: holds no mapping")
    return tree


def read_config(tree: Mapping[str, Any], path: Path) -> tuple[ModelConfig, int, list[str]]:
    """Our model of a config.json, the size of its vocabulary, and notes.

    Args:
        path: the file, for messages.

    Raises:
        CheckpointError: naming the key.
    """

    def refuse(key: str, allowed: str) -> CheckpointError:
        return CheckpointError(f"{path}: {key} = {quoted(json.dumps(tree.get(key)))}: {allowed}")

    types = {model_type: architecture for architecture, (_, model_type) in CLASSES.items()}
    architecture = types.get(str(tree.get("model_type")))
    if architecture is None:
        raise refuse("model_type", f"must be {' or '.join(types)}")
    if others := set(_texts(tree.get("architectures"))) - {CLASSES[architecture][0], *BARE}:
        raise refuse("architectures", f"{quoted(min(others))} is not taken, but {CLASSES[architecture][0]}")
    for key in ("quantization_config", "pruned_heads", "num_experts"):
        if tree.get(key):
            raise refuse(key, "such models are not taken")
    for key, values in FIXED[architecture].items():
        if tree.get(key, values[0]) not in values:
            raise refuse(key, f"must be {' or '.join(map(json.dumps, values))}")
    if set(_texts(tree.get("layer_types"))) - {"full_attention"}:
        raise refuse("layer_types", "must be full_attention in every layer")
    defaults: dict[str, Any] = {"initializer_range": 0.02, "layer_norm_epsilon": 1e-5, "rms_norm_eps": 1e-6}
    defaults |= {"tie_word_embeddings": architecture == "gpt2", "n_inner": None}
    names = KEYS[architecture] | SHARED_KEYS
    values = {}
    for ours, theirs in names.items():
        if theirs not in tree and theirs not in defaults:
            raise CheckpointError(f"{path}: {theirs} is missing")
        values[ours] = tree.get(theirs, defaults.get(theirs))
    dropouts = {key: tree.get(key, 0.1 if architecture == "gpt2" else 0.0) for key in DROPOUTS[architecture]}
    values |= {"architecture": architecture, "dropout": next(iter(dropouts.values()))}
    if len(set(map(str, dropouts.values()))) > 1:
        raise CheckpointError(f"{path}: {quoted(dropouts)}: one dropout for all is known here; make them equal")
    known = IGNORED | set(names.values()) | set(dropouts) | FIXED[architecture].keys() | {"layer_types"}
    if architecture == "modern":
        values["rope_theta"] = _rope_theta(tree, path)
        known |= {"rope_theta", "rope_parameters", "rope_scaling"}
    vocab_size = tree.get("vocab_size")
    if type(vocab_size) is not int or vocab_size < 1:
        raise refuse("vocab_size", "must be a whole number >= 1")
    model = _model(values, names, path)
    unknown = sorted(key for key in tree.keys() - known if not key.startswith("_") and tree[key] is not None)
    notes = [f"{path}: {', '.join(map(quoted, unknown))}: not known here, and not used"] if unknown else []
    return model, vocab_size, notes


def _texts(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [] if value is None else [str(value)]


def _rope_theta(tree: Mapping[str, Any], path: Path) -> Any:
    for key in ("rope_parameters", "rope_scaling"):  # the name since transformers 5, and the one before
        rope = tree.get(key) or {}
        kinds = {"rope_type": "default", "type": "default"}
        if not isinstance(rope, dict) or any(rope[one] != kinds.get(one) for one in rope.keys() - {"rope_theta"}):
            raise CheckpointError(f"{path}: {key} = {quoted(rope)}: must be the default, without scaling")
    return (tree.get("rope_parameters") or {}).get("rope_theta", tree.get("rope_theta", 10000.0))


def _model(values: dict[str, Any], names: Mapping[str, str], path: Path) -> ModelConfig:
    """What stands for a default of ours becomes that default, so that an exported model is the same model again."""
    if values["architecture"] == "gpt2" and values["d_hid"] is None and isinstance(values["d_model"], int):
        values["d_hid"] = 4 * values["d_model"]
    given = {key: value for key, value in values.items() if key not in ("epsilon", "kv_heads", "head_width")}
    given |= {"norm_eps": values["epsilon"], "n_kv_head": values.get("kv_heads"), "head_dim": values.get("head_width")}
    try:
        model = read_section(ModelConfig, given, Findings(str(path)))
        for key in ("norm_eps", "n_kv_head", "head_dim"):
            try:
                without = ModelConfig.model_validate(model.model_dump() | {key: None})
            except ValueError:  # the others need it
                continue
            if all(getattr(without, one) == getattr(model, one) for one in ("epsilon", "kv_heads", "head_width")):
                model = without
    except ConfigError as error:
        theirs = {**names, "norm_eps": names["epsilon"], "n_kv_head": names.get("kv_heads", "n_kv_head")}
        said = re.sub(r"\w+", lambda word: theirs.get(word.group(), word.group()), str(error))
        raise CheckpointError(said) from error
    return model


def _tensors(path: Path, model: ModelConfig, names: Sequence[str]) -> dict[str, tuple[Path, str]]:
    """Every tensor of the folder by the name that `chatgot export` gives it."""
    if WEIGHTS in names:
        files = [WEIGHTS]
        listed = None
    elif INDEX in names:
        listed = read_json(path / INDEX, LARGEST_INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
            raise CheckpointError(f"{path / INDEX}: has no weight_map")
        files = sorted(set(listed.values()))
        for name in files:
            if name != Path(name).name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{path / INDEX}: names {quoted(name)}: must be a .safetensors file in the folder"
                )
            if name not in names:
                raise CheckpointError(f"{path / name}: this shard is missing; get the whole folder again")
    else:
        raise CheckpointError(f"{path}: neither {WEIGHTS} nor {INDEX} is there; weights are read from safetensors only")
    held = [(stored, name) for name in files for stored in open_safetensors(path / name, "np").keys()]  # noqa: SIM118
    if listed is not None and (wrong := sorted(listed.items() ^ set(held))):
        stored, name = wrong[0]
        raise CheckpointError(
            f"{path / INDEX}: does not agree with {name} about {quoted(stored)}; get the whole folder again"
        )
    tensors: dict[str, tuple[Path, str]] = {}
    prefix = PREFIX[model.architecture]
    for stored, name in held:
        full = stored if stored.startswith((prefix, "lm_head.")) else prefix + stored
        if any(fnmatch(full, buffer) for buffer in BUFFERS):
            continue
        if full in tensors:
            raise CheckpointError(f"{path / name}: {quoted(stored)} stands in the folder twice")
        tensors[full] = (path / name, stored)
    return tensors


def open_safetensors(path: Path, framework: str) -> Any:
    """The library's reader of a file. Raises CheckpointError where it is none, or cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is no whole safetensors file: {error}") from error


def _compare(folder: Folder) -> None:
    """Hold names, shapes and types against the model that config.json describes."""
    if folder.model.n_layers > len(folder.tensors):
        raise CheckpointError(
            f"{folder.path}: {folder.model.n_layers} layers in {CONFIG} are more than there are tensors"
        )
    parts = {part.name: part.shape for part in folder.parts}
    if folder.model.tie_embeddings and "lm_head.weight" in folder.tensors:
        parts["lm_head.weight"] = parts[f"{OUTSIDE[folder.model.architecture]['embed_tokens']}.weight"]
    if missing := parts.keys() - folder.tensors.keys():
        raise CheckpointError(f"{folder.path}: tensor {min(missing)} is missing, which {CONFIG} asks for")
    if others := folder.tensors.keys() - parts.keys():
        file, stored = folder.tensors[min(others)]
        raise CheckpointError(f"{file}: tensor {quoted(stored)}: the model of {CONFIG} has none of that name")
    opened = {path: open_safetensors(path, "np") for path, _ in folder.tensors.values()}
    for name, (path, stored) in folder.tensors.items():
        tensor = opened[path].get_slice(stored)
        shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
        if shape != parts[name]:
            raise CheckpointError(f"{path}: {name} has shape {shape}, {CONFIG} asks for {parts[name]}")
        if kind not in TYPES:
            raise CheckpointError(f"{path}: {name} is of type {kind}, taken are {', '.join(TYPES)}")


def run_config(name_or_path: str, overrides: Mapping[str, Any], model: Mapping[str, Any], where: Path) -> RunConfig:
    """The run YAML with another model section and its tokenizer given; overrides may change FREE only.

    Args:
        model: the section, as `ModelConfig` has it.
        where: it comes from, for messages.

    Raises:
        ConfigError: see `load_run_config`; or an override that would make another model of it.
    """
    if overrides.get("data.tokenizer", "given") != "given":
        raise ConfigError(f"override data.tokenizer = {overrides['data.tokenizer']}: {where} brings its tokenizer")
    config = load_run_config(name_or_path, {**overrides, "data.tokenizer": "given"}, model)
    own = ModelConfig.model_validate(dict(model))
    for key in ModelConfig.model_fields.keys() - set(FREE):
        if (asked := getattr(config.model, key)) != (there := getattr(own, key)):
            may = " and ".join(f"model.{one}" for one in FREE[:2])
            raise ConfigError(f"override model.{key} = {asked}: {where} has {there}; only {may} may differ")
    if config.model.max_seq_length > own.max_seq_length:
        longest = f"{where} has {own.max_seq_length}, and may be cut only"
        raise ConfigError(f"override model.max_seq_length = {config.model.max_seq_length}: {longest}")
    return config
