"""Overrides after the flags: `model.n_layers=4 train.max_steps=200 ds.optimizer.params.lr=3e-4`.

`model.`, `data.` and `train.` edit the run YAML; `ds.` edits the DeepSpeed JSON, its chatgot section included
(`ds.chatgot.schedule.type=wsd`). `effect` says what a change of a setting does to a run.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any

from chatgot.config.run import RunConfig
from chatgot.deepspeed_json import schema
from chatgot.deepspeed_json.findings import around, shortened
from chatgot.deepspeed_json.key_types import Effect
from chatgot.deepspeed_json.settings import ChatGoTSection, dotted_keys
from chatgot.errors import ConfigError

_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None, "~": None}
_OPEN = ("optimizer.params.", "scheduler.params.")
_OURS: dict[Effect, str] = {
    "batches": "data train.seed model.max_seq_length",
    "rounding": "ds.chatgot.activation_checkpointing ds.chatgot.compile ds.optimizer.params.torch_adam "
    "ds.optimizer.params.fused",
    "nothing": "ds.chatgot.checkpoint ds.chatgot.guard ds.chatgot.wandb train.log_every train.eval_every "
    "train.eval_tokens train.sample_every train.sample_prompts train.sample_max_new_tokens train.sample_temperature "
    "train.sample_top_k train.sample_seed train.sample_stop",
}
_EFFECTS: dict[str, Effect] = {
    **{f"ds.{dotted}": node.effect for dotted, node in schema.NODES.items() if node.effect is not None},
    **{name: effect for effect, names in _OURS.items() for name in names.split()},
}
"""What stands for a section holds inside it."""


def parse_overrides(items: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split and parse `key=value` words.

    Values are JSON (`3e-4`, `[0.9,0.95]`, `"text"`, `true`, `null`), YAML in brackets (`[a, b]`), or else plain text.

    Returns:
        run: {'model.n_layers': 4} for the run YAML; ds: {'optimizer.params.lr': 3e-4} for the DeepSpeed JSON, without
            the leading 'ds.'.

    Raises:
        ConfigError: a missing '=', a key that no schema knows (with the nearest one), a key given twice, a value that
            cannot be parsed; all of them at once, one per line.
    """
    run: dict[str, Any] = {}
    ds: dict[str, Any] = {}
    problems: list[str] = []
    run_keys = frozenset(key for key in dotted_keys(RunConfig) if "." in key)
    ds_keys = frozenset((*schema.NODES, *dotted_keys(ChatGoTSection, "chatgot.")))
    for given in items:
        item = shortened(given, 200)
        key, equals, text = given.partition("=")
        key = key.strip()
        if not equals:
            problems.append(
                f"override {item}: expected key=value, for example train.max_steps=200 or ds.optimizer.params.lr=3e-4"
            )
            continue
        home, name = (ds, key[3:]) if key.startswith("ds.") else (run, key)
        is_argument = name.startswith(_OPEN) and name not in _OPEN
        if not (is_argument or schema.documented(name) in ds_keys if home is ds else name in run_keys):
            problems.append(f"override {item}: no such key{_nearest(key, run_keys, ds_keys)}")
        elif name in home:
            problems.append(f"override {item}: {key} is given twice")
        else:
            try:
                home[name] = parse_value(text)
            except (ValueError, RecursionError) as error:
                problems.append(f"override {item}: the value cannot be read: {shortened(str(error), 200)}")
    if problems:
        raise ConfigError("\n".join(problems))
    return run, ds


def parse_value(text: str) -> Any:
    """One value; ValueError for an unfinished list, mapping or quoted text."""
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _NUMBER.fullmatch(text):
        plain = text.replace("_", "")
        return int(plain) if re.fullmatch(r"[+-]?\d+", plain) else float(plain)
    if text[:1] in tuple("[{\"'"):
        return _parse_brackets(text)
    return text


def _parse_brackets(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # not JSON: YAML's quotes and bare words are allowed too
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from None


def _nearest(key: str, run_keys: frozenset[str], ds_keys: frozenset[str]) -> str:
    known = [*run_keys, *(f"ds.{name}" for name in ds_keys)]
    same_end = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    close = difflib.get_close_matches(key, same_end, n=1, cutoff=0.3) or difflib.get_close_matches(
        key, known, n=1, cutoff=0.6
    )
    return f"; did you mean '{close[0]}'?" if close else ""


def effect(name: str) -> Effect:
    """Tell what changing a setting, named as overrides name it, does to a run's numbers: "numbers", if nothing else is
    known of it. A resume compares itself with the journal accordingly.

    A line of run_folder.changed_settings will do, too: it begins with the name.
    """
    begins = re.match(r"[\w.]+", name)
    name = (begins.group() if begins else name).rstrip(".")
    name = f"ds.{schema.documented(name[3:])}" if name.startswith("ds.") else name
    for one in around(name):
        if one in _EFFECTS:
            return _EFFECTS[one]
    return "numbers"
