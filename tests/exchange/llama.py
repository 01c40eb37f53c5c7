"""llama.cpp, where the package xllamacpp is installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any


def llama_continues(model: Path, prompt: str, tokens: int) -> str:
    """The likeliest continuation by llama.cpp, without the prompt."""
    llama: Any = importlib.import_module("xllamacpp")

    params = llama.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.warmup, params.n_gpu_layers = 128, False, 0
    params.cpuparams.n_threads = 1
    answer = llama.Server(params).handle_completions({"prompt": prompt, "n_predict": tokens, "temperature": 0.0})
    return answer["choices"][0]["text"]
