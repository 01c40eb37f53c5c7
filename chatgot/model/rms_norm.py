"""Root-mean-square normalisation (Zhang and Sennrich, 2019), with a backward of our own for the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 and returned in x.dtype.

    Args:
        x: (..., d).
        weight: (d,).
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _EagerRMSNorm.apply(x, weight, eps)  # type: ignore[return-value]
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


class _EagerRMSNorm(torch.autograd.Function):
    """On a CPU F.rms_norm is decomposed into many passes over memory; this forward and backward take half its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
        h = x.float()
        norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
        scale = norm.square_().mul_(1 / h.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        unit = h * scale
        ctx.save_for_backward(unit, scale, weight)
        return (unit * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        unit, scale, weight = ctx.saved_tensors
        grad_unit = grad * unit  # fp32, like unit
        grad_weight = grad_unit.flatten(0, -2).sum(0)
        along = torch.linalg.vecdot(grad_unit, weight.float()).unsqueeze(-1).mul_(1 / unit.shape[-1])  # (..., 1)
        grad_x = torch.addcmul(grad * weight.float(), unit, along, value=-1).mul_(scale)
        return grad_x.to(grad.dtype), grad_weight.to(weight.dtype), None
