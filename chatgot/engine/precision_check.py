"""Before the engine exists: a slice of a batch in fp32 and in the run's precision, to refuse one that does not work."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chatgot.deepspeed_json.resolve import EngineConfig
from chatgot.devices import is_out_of_memory
from chatgot.distributed import ControlGroup
from chatgot.errors import NumericsError
from chatgot.model.gpt import GPT

SAMPLES = 2
"""Of a rank's first micro-batch: enough to pass through every kernel, at a few percent of a step's cost."""

BOUNDS = {"bf16": (2e-2, 0.2), "fp16": (5e-3, 0.05)}
"""Relative difference from fp32 allowed to the loss and to the gradient norm. bf16 has 8 significant bits and fp16 has
11; sound models of both architectures differ by less than a tenth of this at their initial weights."""


@dataclass(frozen=True)
class PrecisionCheck:
    """Both precisions on the rank where they differ most: nats per token, and unscaled norms of all gradients."""

    precision: str
    samples: int
    loss: float
    loss_fp32: float
    grad_norm: float
    grad_norm_fp32: float
    bounds: tuple[float, float]

    @property
    def differences(self) -> tuple[float, float]:
        """Of the loss and of the gradient norm, relative to fp32; inf where one of them is not finite."""
        return _difference(self.loss, self.loss_fp32), _difference(self.grad_norm, self.grad_norm_fp32)

    @property
    def excess(self) -> float:
        """The larger of both differences, in units of its bound; up to 1 is fine."""
        return max(difference / bound for difference, bound in zip(self.differences, self.bounds))

    def describe(self) -> str:
        """One line."""
        loss, norm = (f"(differ by {by:.1e}, bound {most:g})" for by, most in zip(self.differences, self.bounds))
        return (
            f"precision check, {self.samples} sample(s) per rank in {self.precision} and fp32: "
            f"loss {self.loss:.5f} and {self.loss_fp32:.5f} {loss}, "
            f"gradient norm {self.grad_norm:.5g} and {self.grad_norm_fp32:.5g} {norm}"
        )

    def to_json(self) -> dict[str, Any]:
        """Fields of the event."""
        values = {key: value for key, value in vars(self).items() if key != "bounds"}
        for name, difference, bound in zip(("loss", "grad_norm"), self.differences, self.bounds):
            values |= {f"{name}_difference": difference, f"{name}_bound": bound}
        return values


def _difference(value: float, exact: float) -> float:
    difference = abs(value - exact) / max(abs(exact), 1e-12)
    return difference if math.isfinite(difference) else math.inf


def check_precision(
    model: GPT, config: EngineConfig, input_ids: Tensor, targets: Tensor, device: torch.device, ranks: ControlGroup
) -> tuple[PrecisionCheck | None, str]:
    """Compare the run's precision with fp32, forward and backward, on copies of the plain model. Collective.

    Without dropout and engine: it is the same at every ZeRO stage, and no counter moves.

    Args:
        model: with its initial weights; they stay as they are.
        input_ids, targets: this rank's first micro-batch, (B, T) each; SAMPLES of it are used.

    Returns:
        The check (of the rank where it is worst), or None where there is nothing to compare; and a line for the user.

    Raises:
        NumericsError: on all ranks; the difference is beyond the bounds.
    """
    if config.precision == "fp32":
        return None, "precision check: not needed in fp32"
    batch = input_ids[:SAMPLES], targets[:SAMPLES]
    n_bytes = 8 * sum(p.numel() for p in model.parameters()) + activation_bytes(model, batch[0].numel())
    own = None
    if device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > n_bytes:
        try:
            own = _compare(model, config, batch[0].to(device), batch[1].to(device))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    compared = [check for check in ranks.gather(own) if check is not None]
    if len(compared) < ranks.world_size:
        what = f"an fp32 copy with its gradients and activations, {n_bytes / 2**30:.1f} GiB"
        return None, f"precision check: skipped, no room for {what}"
    worst = max(compared, key=lambda check: check.excess)
    if worst.excess > 1:
        remedy = f"{config.precision} does not compute this model; train in fp32, or in bf16 instead of fp16"
        raise NumericsError(f"{config.path}: {worst.describe()}: {remedy}")
    return worst, worst.describe()


def activation_bytes(model: GPT, tokens: int) -> int:
    """Estimate what a forward in fp32 keeps for its backward: of each token and block about 20 vectors of the model's
    width and 4 of the hidden one, and the logits three times.
    """
    config, vocab_size = model.config, model.embed_tokens.num_embeddings
    return 4 * tokens * (config.n_layers * (20 * config.d_model + 4 * config.d_hid) + 3 * vocab_size)


def _compare(model: GPT, config: EngineConfig, input_ids: Tensor, targets: Tensor) -> PrecisionCheck:
    loss_fp32, norm_fp32 = _measure(model, "fp32", input_ids, targets, (1.0,))
    loss, norm = _measure(model, config.precision, input_ids, targets, _scales(config))
    bounds = BOUNDS[config.precision[-4:]]
    return PrecisionCheck(config.precision, len(input_ids), loss, loss_fp32, norm, norm_fp32, bounds)


def _scales(config: EngineConfig) -> tuple[float, ...]:
    """fp16's loss scales from the first to the smallest, as DeepSpeed would search them."""
    if not config.precision.endswith("fp16"):
        return (1.0,)
    fp16 = config.deepspeed.get("fp16") or {}
    if fp16.get("loss_scale"):
        return (float(fp16["loss_scale"]),)
    return tuple(2.0**power for power in range(int(fp16.get("initial_scale_power", 16)), -1, -1))


def _measure(
    model: GPT, precision: str, input_ids: Tensor, targets: Tensor, scales: tuple[float, ...]
) -> tuple[float, float]:
    """Loss and gradient norm on a copy of the model, with the first of the loss scales that does not overflow."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    copied = copy.deepcopy(model).to(device=input_ids.device, dtype=dtype).eval()
    parameters = [p for p in copied.parameters() if p.requires_grad]
    loss, norm = math.nan, math.nan
    for scale in scales:
        with autocast(precision, input_ids.device):
            loss_tensor = copied(input_ids, targets)
        gradients = torch.autograd.grad(loss_tensor * scale, parameters, allow_unused=True)
        norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for each in gradients if each is not None]
        loss, norm = float(loss_tensor.detach()), float(torch.linalg.vector_norm(torch.stack(norms))) / scale
        if math.isfinite(norm) or not math.isfinite(loss):
            break
    return loss, norm


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """What DeepSpeed's engine opens around a forward under torch_autocast; without effect in other precisions."""
    dtype = {"autocast_bf16": torch.bfloat16, "autocast_fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
