"""Weights of a folder in transformers' layout, read tensor by tensor into our model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from chatgot.config.run import ModelConfig
from chatgot.errors import CheckpointError
from chatgot.exchange.folder import Folder, open_safetensors
from chatgot.model.gpt import GPT


@torch.no_grad()
def fill(model: GPT, folder: Folder) -> None:
    """Copy every tensor of the folder into the model, whose context may be shorter. One tensor is in memory at most.

    Raises:
        CheckpointError: a value is not finite, or a second copy of a tied tensor is another one.
    """
    own = dict(model.named_parameters())
    with ExitStack() as opened:
        files: dict[Path, Any] = {}

        def read(name: str) -> torch.Tensor:
            path, stored = folder.tensors[name]
            if path not in files:
                files[path] = opened.enter_context(open_safetensors(path, "pt"))
            return files[path].get_tensor(stored)

        for part in folder.parts:
            tensor = read(part.name)
            tensor = tensor.T if part.transposed else tensor
            rows = own[part.ours][part.start : part.start + part.rows]
            rows.copy_(tensor[: len(rows)])  # positions beyond a shorter context are left out
            if not rows.isfinite().all():
                raise CheckpointError(f"{folder.tensors[part.name][0]}: {part.name} has values that are not finite")
        again = "lm_head.weight"
        tied_twice = folder.model.tie_embeddings and again in folder.tensors
        if tied_twice and not torch.equal(read(again).to(model.lm_head.weight.dtype), model.lm_head.weight):
            where = folder.tensors[again][0]
            raise CheckpointError(f"{where}: {again} is not the embedding, and tie_word_embeddings is true")


def filled(folder: Folder, config: ModelConfig | None = None) -> GPT:
    """Our model of a folder, fp32, in evaluation mode. Raises CheckpointError, see `fill`.

    Args:
        config: with another context; default: the folder's.
    """
    model = GPT(config or folder.model, folder.vocab_size)
    fill(model, folder)
    return model.eval()
