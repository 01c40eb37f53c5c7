"""Tiny shapes that the model tests share."""

from __future__ import annotations

import torch

from chatgot.config.run import ModelConfig
from chatgot.model.gpt import GPT

VOCAB = 37
GPT2 = ModelConfig(architecture="gpt2", d_model=32, n_layers=3, n_head=4, d_hid=80, max_seq_length=16)
MODERN = ModelConfig(architecture="modern", d_model=32, n_layers=3, n_head=4, d_hid=48, max_seq_length=16)
GROUPED = ModelConfig(architecture="modern", d_model=32, n_layers=3, n_head=4, n_kv_head=2, d_hid=48, max_seq_length=16)
SHAPES = {"gpt2": GPT2, "modern": MODERN, "grouped": GROUPED}


def random_gpt(config: ModelConfig, vocab_size: int = VOCAB, seed: int = 0, std: float = 0.2) -> GPT:
    """A GPT in evaluation mode with every parameter, biases and norms included, away from its initial value."""
    model = GPT(config, vocab_size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.ndim == 1 and "norm" in name and not name.endswith("bias") else 0.0
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def random_ids(rows: int, length: int, seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    """Token ids (rows, length)."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
