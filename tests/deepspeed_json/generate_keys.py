"""Write chatgot/deepspeed_json/deepspeed_keys.py anew, for the DeepSpeed that is installed.

    python -m tests.deepspeed_json.generate_keys

Sections that DeepSpeed reads with pydantic models get their keys, defaults, ranges and deprecations from the models;
what DeepSpeed does not say (descriptions, choices, what ChatGoT resolves, what a key does to a run's numbers) is kept
from the file as it stands. A key that is new arrives without a description, and one that is gone leaves. The other
sections have no model: test_schema_contract.py names what moved in them. Defaults of optimizers and schedulers are
those of their classes.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime import lr_schedules
from pydantic_core import PydanticUndefined

from chatgot.deepspeed_json import deepspeed_keys as keys
from chatgot.deepspeed_json.key_types import Key, Section

FILE = Path(keys.__file__)
TYPES = {
    "flag": "bool",
    "int": "int",
    "float": "float",
    "text": "str",
    "path": "str",
    "texts": "list[str]",
    "words": "list[str]",
    "betas": "list[float]",
    "numbers": "float | list[float]",
    "mapping": "dict[str, Any]",
    "interval": "str | int",
}
OPTIMIZERS = {
    "adam/fused": "deepspeed.ops.adam:FusedAdam",
    "adam/cpu": "deepspeed.ops.adam:DeepSpeedCPUAdam",
    "adam/torch": "torch.optim:AdamW",
    "adagrad/torch": "torch.optim:Adagrad",
    "adagrad/cpu": "deepspeed.ops.adagrad:DeepSpeedCPUAdagrad",
    "lamb": "deepspeed.ops.lamb:FusedLamb",
    "lion/fused": "deepspeed.ops.lion:FusedLion",
    "lion/cpu": "deepspeed.ops.lion:DeepSpeedCPULion",
}
"""The class that DeepSpeed builds for an entry of OPTIMIZER_PARAMS; Muon's gives its defaults to parameter groups."""
KINDS = ((bool, "flag"), (int, "int"), (float, "float"), (str, "text"), (dict, "mapping"))
LIMITS = {"ge": "low", "gt": "above", "le": "high", "lt": "below"}


def model_of(section: Section) -> Any:
    """The pydantic model that reads a section."""
    module, _, name = section.model.partition(":")
    return getattr(importlib.import_module(module), name)


def updated(section: Section) -> dict[str, Key | Section]:
    """The keys of a section as the installed DeepSpeed has them, in our order, new ones last."""
    if not section.model:
        return section.keys
    fields = model_of(section).model_fields
    ours = {node.alias or name: name for name, node in section.keys.items()} | {name: name for name in section.keys}
    by_name = {ours.get(field, info.alias or field): info for field, info in fields.items()}
    known = {name: node for name, node in section.keys.items() if name in by_name}
    new = {name: None for name in by_name if name not in known}
    return {name: _updated_key(node, by_name[name]) for name, node in {**known, **new}.items()}


def _updated_key(node: Key | Section | None, info: Any) -> Key | Section:
    if isinstance(node, Section):
        return node
    default = info.default
    if default is PydanticUndefined and info.default_factory is not None:
        default = None if node is not None and node.default is None else info.default_factory()
    default = getattr(default, "value", default)
    if node is None:
        kind = next((kind for python, kind in KINDS if isinstance(default, python)), "mapping")
        node = Key(kind, help="", null=default is None)  # type: ignore[arg-type]
    if isinstance(default, int) and not isinstance(default, bool):
        default = float(default) if node.kind == "float" else int(default)  # DeepSpeed's own class of whole numbers
    if node.default is not None and str(default).startswith("torch."):
        default = node.default  # a torch type, which the file spells as DeepSpeed's texts do
    limits = {
        ours: getattr(limit, theirs)
        for limit in info.metadata
        for theirs, ours in LIMITS.items()
        if hasattr(limit, theirs)
    }
    return dataclasses.replace(node, default=default, **limits)


def class_of(owner: str) -> Any:
    """The optimizer's or scheduler's class; None for Muon's."""
    if place := OPTIMIZERS.get(owner):
        module, _, name = place.partition(":")
        return getattr(importlib.import_module(module), name)
    if owner.startswith("torch."):
        return getattr(torch.optim, owner.removeprefix("torch."))
    return getattr(lr_schedules, owner, None) or getattr(torch.optim.lr_scheduler, owner, None)


def with_defaults(owner: str, arguments: dict[str, Key]) -> dict[str, Key]:
    """The arguments with the defaults of the class that takes them."""
    parameters = inspect.signature(class_of(owner)).parameters if class_of(owner) else {}
    found = {}
    for name, node in arguments.items():
        default = parameters[name].default if name in parameters else node.default
        default = None if default is inspect.Parameter.empty else default
        if isinstance(default, tuple):
            default = list(default)
        elif node.kind == "float" and default is not None:
            default = float(default)
        found[name] = dataclasses.replace(node, default=default)
    return found


def literal(value: Any) -> str:
    """Python source of a value, with double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int) and not isinstance(value, bool) and value == sys.maxsize:
        return "sys.maxsize"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(map(literal, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def stated(node: Key | Section, but: tuple[str, ...]) -> list[str]:
    """name=value of every field that is not its default."""
    fields = [field for field in dataclasses.fields(node) if field.name not in but]
    return [f"{f.name}={literal(getattr(node, f.name))}" for f in fields if getattr(node, f.name) != f.default]


def call(node: Key) -> str:
    """The call of `key` that states a key."""
    first = [literal(node.kind), literal(node.default), *([literal(node.help)] if node.help else [])]
    return f"key({', '.join(first + stated(node, ('kind', 'default', 'help')))})"


def annotation(node: Key) -> str:
    """The type of a key's value."""
    text = TYPES[node.kind]
    if (node.auto or (node.kind == "texts" and node.default == "auto")) and node.kind in (
        "int",
        "flag",
        "texts",
        "float",
    ):
        text += " | str"
    return text + (" | None" if node.null or node.default is None else "")


def classes(section: Section, name: str) -> list[str]:
    """The classes of the sections below this one, then its own."""
    below, body = [], []
    for key, node in updated(section).items():
        if isinstance(node, Section):
            inner = ("" if name == "Root" else name) + "".join(word.capitalize() for word in key.split("_"))
            below += classes(node, inner)
            arguments = ", ".join([inner, *stated(node, ("keys", "help", "group"))])
            body.append(f"    {key}: {inner} = section({arguments})")
        else:
            body.append(f"    {key}: {annotation(node)} = {call(node)}")
    return [*below, "\n".join([f'class {name}(Group):\n    """{section.help}"""\n', *body])]


def table(name: str) -> str:
    """A table of arguments, as it stands but for the defaults."""
    lines = [f"{name}: dict[str, dict[str, Key]] = {{"]
    for owner, arguments in getattr(keys, name).items():
        lines += [
            f"    {literal(owner)}: {{",
            *(f"{literal(key)}: {call(node)}," for key, node in with_defaults(owner, arguments).items()),
            "},",
        ]
    text = FILE.read_text(encoding="utf-8")
    doc = text[text.index('"""', text.index(f"{name}: ")) :]
    return "\n".join([*lines, "}", '"""' + doc.split('"""')[1] + '"""'])


def generate() -> str:
    """The whole file, formatted."""
    head = FILE.read_text(encoding="utf-8").partition("\nclass ")[0].rstrip()
    root = Section(keys.Root.KEYS, keys.Root.__doc__ or "")
    parts = [head, *classes(root, "Root"), table("OPTIMIZER_PARAMS"), table("SCHEDULER_PARAMS")]
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(FILE), "-"]
    return subprocess.run(ruff, input="\n\n\n".join(parts), capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    FILE.write_text(generate(), encoding="utf-8")
