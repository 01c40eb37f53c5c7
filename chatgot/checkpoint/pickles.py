"""DeepSpeed's files of a checkpoint: looked at without torch, and read, without ever running code of theirs."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

from chatgot.errors import CheckpointError, quoted

LARGEST = 256 << 20
"""Bytes of what a file says of its tensors, without their elements."""
_PLAIN = re.compile(
    r"torch\.(\w*Storage|u?int\d+|b?float\d+\w*|bool|device|Tensor|nn\.parameter\.Parameter|_utils\._rebuild_\w+)"
)
"""Types, and what makes tensors, beside those that `_Look.find_class` knows."""
_OURS = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
"""What DeepSpeed 0.19.8 puts into its optimizer files; none of them does anything when it is made."""
_BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
"""Of an element, by storage; 1 in all others."""


def look(path: Path) -> Any:
    """Look at a file of torch.save without reading elements: what `read` would return, with the shape of a tensor in
    its place, and an empty object for one of the few classes.

    Raises:
        CheckpointError: it holds more than tensors, plain values and those classes; a record is compressed; or a tensor
            is larger than the file.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                file.seek(0)
                for _ in range(3):  # magic number, version, byte order
                    _Look(file, {}, path.stat().st_size).load()
                return _Look(file, {}, path.stat().st_size).load()
            with zipfile.ZipFile(file) as archive:
                records = {one.filename.partition("/")[2]: one for one in archive.infolist()}
                if len(records) < len(archive.infolist()):
                    raise CheckpointError("a record is there twice, and readers differ in which one they take")
                if bad := [name for name, one in records.items() if one.compress_type != zipfile.ZIP_STORED]:
                    raise CheckpointError(f"record {quoted(bad[0])} is compressed, which torch.save never does")
                if (size := records["data.pkl"].file_size) > LARGEST:
                    raise CheckpointError(f"record data.pkl has {size} bytes, and at most {LARGEST} are read")
                sizes = {name.removeprefix("data/"): one.file_size for name, one in records.items()}
                return _Look(io.BytesIO(archive.read(records["data.pkl"])), sizes, 0).load()
    except CheckpointError as error:
        raise CheckpointError(f"file {path.name}: {error}") from error
    except Exception as error:  # a file that nobody has checked: whatever its contents raise
        why = quoted(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"file {path.name}: cannot be read: {why}") from error


class _Stub:
    """Stands for a type, or for an object of one."""

    def __init__(self, *args: Any) -> None: ...


class _Look(pickle._Unpickler):  # type: ignore[name-defined]  # the one in C takes any amount of memory for its memo
    def __init__(self, file: Any, sizes: dict[str, int], largest: int) -> None:
        """`sizes` of the records by key; in torch's older format there are none, and the file's size counts."""
        super().__init__(file)
        self._sizes, self._largest = sizes, largest

    def find_class(self, module: str, name: str) -> Any:
        known = f"{module}.{name}"
        if re.fullmatch(r"torch\._utils\._rebuild_tensor(_v[23])?", known):
            return self._tensor
        if known in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return lambda tensor, *more: tensor
        if known == "torch._tensor._rebuild_from_type_v2":
            return lambda function, kind, args, state: function(*args)
        if known in ("torch.Size", "collections.Counter", "builtins.set", "_codecs.encode"):  # of torch's schedulers
            return lambda value=(), *more: value
        if known == "collections.OrderedDict":
            return lambda: OrderedDict()
        if known in _OURS or _PLAIN.fullmatch(known):
            return type(name, (_Stub,), {})
        why = "a checkpoint never needs that, and loading it could run code"
        raise CheckpointError(f"refused: it holds more than tensors and plain values ({quoted(known)}); {why}")

    def persistent_load(self, pid: Any) -> int:
        """The elements of a storage."""
        _, kind, key, _, numel, *_ = pid
        if not 0 <= numel * _BYTES.get(kind.__name__.removesuffix("Storage"), 1) <= self._sizes.get(key, self._largest):
            raise CheckpointError(f"a tensor of {quoted(numel)} elements is larger than the file")
        return numel

    @staticmethod
    def _tensor(numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *more: Any) -> tuple[int, ...]:
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride)) < 0 or (prod(size) and last >= numel) or prod(size) > numel:
            raise CheckpointError(f"a tensor of shape {quoted(list(size))} is larger than its {numel} elements")
        return tuple(size)


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Restrict every torch.load within it, also those of DeepSpeed, which ask for the opposite (weights_only=False).

    torch's own switch for that is an environment variable (torch/serialization.py, load). The classes are _OURS.
    """
    import torch

    ours = [getattr(import_module(module), name) for module, _, name in (one.rpartition(".") for one in _OURS)]
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        with torch.serialization.safe_globals(ours):
            yield
    finally:
        os.environ.pop(names[0], None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def read(path: Path) -> dict[str, Any]:
    """Load one file of a checkpoint without running code: what `look` takes, and raises what it does.

    Its tensors are on the CPU and memory-mapped: their elements are read from the file when they are used. Only torch's
    zip format can be mapped; with checkpoint.checkpoint_serialization = false in the JSON, DeepSpeed writes the older
    one, which is read as a whole.
    """
    import torch

    look(path)
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as torch/serialization.py, _is_zipfile
    with weights_only():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
