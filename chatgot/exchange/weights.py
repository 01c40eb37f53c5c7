"""Weights in other programs' layouts, read tensor by tensor as parameters of our model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from chatgot.errors import CheckpointError
from chatgot.exchange.folder import Folder, open_safetensors
from chatgot.exchange.layout import Part
from chatgot.model.gpt import GPT


class Reader:
    """Parameters of our model by their names, put together of the parts that another layout has of them."""

    def __init__(self, parts: Iterable[Part], read: Callable[[str], torch.Tensor]) -> None:
        """`read`: gives the tensor of a part's name, which may stay in a mapped file."""
        self._read = read
        self._parts: dict[str, list[Part]] = {}
        for part in parts:
            self._parts.setdefault(part.ours, []).append(part)

    def __call__(self, name: str) -> torch.Tensor:
        """A parameter, fp32; mapped where it stands in the file as it is here."""
        pieces = [(part, self._read(part.name)) for part in self._parts[name]]
        turned = [tensor.T if part.transposed else tensor for part, tensor in pieces]
        if len(turned) == 1 and turned[0].dtype == torch.float32:
            return turned[0]
        whole = torch.empty(sum(len(one) for one in turned), *turned[0].shape[1:])
        for (part, _), tensor in zip(pieces, turned):
            whole[part.start : part.start + part.rows] = tensor
        return whole


def reader(folder: Folder) -> Reader:
    """Of a folder in transformers' layout."""
    files: dict[Path, Any] = {}

    def read(name: str) -> torch.Tensor:
        path, stored = folder.tensors[name]
        if path not in files:
            files[path] = open_safetensors(path, "pt")
        return files[path].get_tensor(stored)

    return Reader(folder.parts, read)


@torch.no_grad()
def fill(model: GPT, folder: Folder) -> None:
    """Copy every tensor of the folder into the model, whose context may be shorter. One tensor is in memory at most.

    Raises:
        CheckpointError: a value is not finite, or a second copy of a tied tensor is another one.
    """
    read = reader(folder)
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name)[: len(parameter)])  # positions beyond a shorter context are left out
        if not parameter.isfinite().all():
            raise CheckpointError(f"{folder.path}: {name} has values that are not finite")
    again = "lm_head.weight"
    if folder.model.tie_embeddings and again in folder.tensors:
        path, stored = folder.tensors[again]
        if not torch.equal(open_safetensors(path, "pt").get_tensor(stored).float(), model.lm_head.weight.float()):
            raise CheckpointError(f"{path}: {again} is not the embedding, and tie_word_embeddings is true")
