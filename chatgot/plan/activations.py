"""Bytes that a forward pass keeps for the backward pass, block by block, as the modules of model/gpt.py save them.

The shapes are held against tensors that autograd saves on a CPU (tests/plan/test_activations.py). On CUDA three things
differ, by the sources of torch 2.9 and later: rms_norm is fused and keeps its input, dropout keeps a mask of one byte,
and attention keeps no (T, T) matrix with dropout either.
"""

from __future__ import annotations

from dataclasses import dataclass

from chatgot.plan.settings import FP32, HALF, Settings

INT64 = 8
LOSS_BYTES = 3 * FP32
"""Per logit, when the backward pass starts: log-probabilities, their gradient, the gradient of the logits, all fp32."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro batch on one rank."""

    blocks: tuple[int, ...]
    """Kept by each block until its backward: everything, or only its input where the block is recomputed."""
    block: int
    """What one block keeps when nothing is recomputed; a recomputed block has it again during its own backward."""
    ends: int
    """Kept outside the blocks: embeddings, final norm, the head's input; casts of weights under autocast."""
    logits: int
    """Log-probabilities kept by the loss."""
    loss_peak: int
    """Most that logits and loss take at once."""
    workspace: int
    """Gradients of activations that live while a block is differentiated, beyond the activations freed meanwhile."""
    host: int
    """Inputs of recomputed blocks that wait in host memory."""

    @property
    def saved(self) -> int:
        """All that autograd keeps at the end of the forward pass."""
        return sum(self.blocks) + self.ends + self.logits


def activations(settings: Settings) -> Activations:
    """Bytes kept by one micro batch under the run's recomputation policy."""
    model, tokens = settings.model, settings.tokens
    block = _block(settings)
    block_input = tokens * model.d_model * settings.parameter_bytes
    recomputed = [
        settings.recompute_every is not None and i % settings.recompute_every == 0 for i in range(model.n_layers)
    ]
    kept = 0 if settings.activations_on_cpu else block_input
    logits = tokens * settings.vocab_size * FP32
    return Activations(
        blocks=tuple(kept if again else block for again in recomputed),
        block=block,
        ends=_ends(settings, recomputed),
        logits=logits,
        loss_peak=tokens * settings.vocab_size * LOSS_BYTES,
        workspace=_workspace(settings),
        host=block_input * sum(recomputed) if settings.activations_on_cpu else 0,
    )


def _element(settings: Settings) -> int:
    """Bytes of an element of what matrix products take and give."""
    return FP32 if settings.precision == "fp32" else HALF


def _mask(settings: Settings) -> int:
    """Bytes of an element of what dropout keeps."""
    return 0 if not settings.model.dropout else 1 if settings.on_cuda else settings.parameter_bytes


def _norm(settings: Settings) -> int:
    """Bytes per token of one norm over d_model: its input, or what it is normalised to, and the statistics."""
    if settings.model.architecture == "gpt2":
        return settings.model.d_model * settings.parameter_bytes + 2 * (
            FP32 if settings.on_cuda else settings.parameter_bytes
        )
    return settings.model.d_model * (settings.parameter_bytes if settings.on_cuda else FP32) + FP32


def _block(settings: Settings) -> int:
    model, e = settings.model, _element(settings)
    d, f, a = model.d_model, model.d_hid, model.attention_width
    kv = model.kv_heads * model.head_width
    per_token = 2 * (_norm(settings) + d * e + d * _mask(settings))  # two norms, inputs of qkv and up, two dropouts
    if model.architecture == "modern":
        per_token += 4 * f * e  # gate and up in one, silu(gate), its product with up
        per_token += FP32 * (model.n_head + model.kv_heads) + (0 if settings.on_cuda else FP32 * (a + kv))  # QK-norm
    else:
        per_token += 2 * f * e  # before and after GELU
    grouped = model.kv_heads != model.n_head
    if settings.on_cuda and settings.precision == "fp32" and grouped:
        # There is no kernel for grouped heads in fp32: softmax, and what dropout makes of it, are kept.
        matrices = 1 + 2 * bool(model.dropout)
    elif not settings.on_cuda and model.dropout:
        matrices = 3
    else:
        matrices = 0
    if matrices:
        # scaled q and k, v, the result
        per_token += 3 * a * FP32 + a * e + matrices * FP32 * model.n_head * model.max_seq_length
    else:
        rotated = a + kv if model.architecture == "modern" else 0
        per_token += (a + 2 * kv + rotated) * e + a * e + FP32 * model.n_head  # q, k, v; the result; logsumexp
    return settings.tokens * per_token


def _ends(settings: Settings, recomputed: list[bool]) -> int:
    model, tokens, e = settings.model, settings.tokens, _element(settings)
    size = tokens * (model.d_model * (e + _mask(settings)) + _norm(settings))
    size += 2 * INT64 * tokens  # input_ids and targets
    if settings.precision.startswith("autocast"):
        d, f, a = model.d_model, model.d_hid, model.attention_width
        kv = model.kv_heads * model.head_width
        matrices = d * (a + 2 * kv) + a * d + (3 if model.architecture == "modern" else 2) * d * f
        size += HALF * (settings.vocab_size * d + (len(recomputed) - sum(recomputed)) * matrices)  # weights as cast
    return size


def _workspace(settings: Settings) -> int:
    model, e = settings.model, _element(settings)
    # Gradients as wide as the feed-forward layer, less what has been freed by then.
    wide = 2 if model.architecture == "modern" else 1
    return settings.tokens * (2 * model.d_model * settings.parameter_bytes + wide * model.d_hid * e)
