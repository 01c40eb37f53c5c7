"""Arithmetic: model FLOPs of a token, and what devices can do at most."""

from __future__ import annotations

import re
from typing import Literal

Precision = Literal["bf16", "fp16", "tf32", "fp32"]


def flops_per_token(n_params_non_embedding: int, n_layers: int, d_model: int, seq: int) -> float:
    """Model FLOPs of forward and backward for one token: 6 N + 12 L d T.

    N counts the parameters that are multiplied with: all but the lookups, the output head included also where it is
    tied to the token embedding. The second term is attention's scores and weighted sum, causality not discounted.
    Recomputation (activation checkpointing) is not model work and does not count.
    Source: PaLM (arXiv:2204.02311), appendix B, with heads x head size = d_model; the same formula as nanoGPT's
        estimate_mfu.
    """
    return 6.0 * n_params_non_embedding + 12.0 * n_layers * d_model * seq


_T = 1e12
# Dense (no 2:4 sparsity) peaks from NVIDIA's data sheets, with fp32 accumulation; tf32 is absent where the chip has no
# such unit. Names as torch.cuda.get_device_name gives them, matched as a whole: a laptop chip, a MIG slice or a "D"
# variant is another device.
_PEAKS: tuple[tuple[str, dict[Precision, float]], ...] = (
    (r"GB200.*", {"bf16": 2500 * _T, "fp16": 2500 * _T, "tf32": 1250 * _T, "fp32": 80 * _T}),
    (r"B200.*", {"bf16": 2250 * _T, "fp16": 2250 * _T, "tf32": 1125 * _T, "fp32": 75 * _T}),
    (r"H200 NVL", {"bf16": 835.5 * _T, "fp16": 835.5 * _T, "tf32": 417.5 * _T, "fp32": 60 * _T}),
    (r"H200|GH200.*", {"bf16": 989 * _T, "fp16": 989 * _T, "tf32": 494.5 * _T, "fp32": 67 * _T}),
    (r"H[18]00 PCIe", {"bf16": 756 * _T, "fp16": 756 * _T, "tf32": 378 * _T, "fp32": 51 * _T}),
    (r"H100 NVL", {"bf16": 835.5 * _T, "fp16": 835.5 * _T, "tf32": 417.5 * _T, "fp32": 60 * _T}),
    (
        r"H[18]00(-SXM5.*| \d+GB HBM\S*| SXM5.*)?",
        {"bf16": 989 * _T, "fp16": 989 * _T, "tf32": 494.5 * _T, "fp32": 67 * _T},
    ),
    (r"A[18]00(-| ).*\d+GB.*", {"bf16": 312 * _T, "fp16": 312 * _T, "tf32": 156 * _T, "fp32": 19.5 * _T}),
    (r"A30", {"bf16": 165 * _T, "fp16": 165 * _T, "tf32": 82 * _T, "fp32": 10.3 * _T}),
    (r"A40", {"bf16": 149.7 * _T, "fp16": 149.7 * _T, "tf32": 74.8 * _T, "fp32": 37.4 * _T}),
    (r"A10", {"bf16": 125 * _T, "fp16": 125 * _T, "tf32": 62.5 * _T, "fp32": 31.2 * _T}),
    (r"RTX A6000", {"bf16": 154.8 * _T, "fp16": 154.8 * _T, "tf32": 77.4 * _T, "fp32": 38.7 * _T}),
    (r"RTX 6000 Ada Generation", {"bf16": 364.2 * _T, "fp16": 364.2 * _T, "tf32": 182.1 * _T, "fp32": 91.1 * _T}),
    (r"L40S", {"bf16": 362 * _T, "fp16": 362 * _T, "tf32": 183 * _T, "fp32": 91.6 * _T}),
    (r"L40", {"bf16": 181 * _T, "fp16": 181 * _T, "tf32": 90.5 * _T, "fp32": 90.5 * _T}),
    (r"L4", {"bf16": 121 * _T, "fp16": 121 * _T, "tf32": 60 * _T, "fp32": 30.3 * _T}),
    (r"GeForce RTX 5090", {"bf16": 209.5 * _T, "fp16": 209.5 * _T, "tf32": 104.8 * _T, "fp32": 104.8 * _T}),
    (r"GeForce RTX 4090", {"bf16": 165.2 * _T, "fp16": 165.2 * _T, "tf32": 82.6 * _T, "fp32": 82.6 * _T}),
    (r"GeForce RTX 4080", {"bf16": 97.5 * _T, "fp16": 97.5 * _T, "tf32": 48.7 * _T, "fp32": 48.7 * _T}),
    (r"GeForce RTX 3090 Ti", {"bf16": 80 * _T, "fp16": 80 * _T, "tf32": 40 * _T, "fp32": 40 * _T}),
    (r"GeForce RTX 3090", {"bf16": 71 * _T, "fp16": 71 * _T, "tf32": 35.6 * _T, "fp32": 35.6 * _T}),
    (r"GeForce RTX 3080", {"bf16": 59.5 * _T, "fp16": 59.5 * _T, "tf32": 29.8 * _T, "fp32": 29.8 * _T}),
    (r"V100-SXM2.*", {"fp16": 125 * _T, "fp32": 15.7 * _T}),
    (r"V100-PCIE.*", {"fp16": 112 * _T, "fp32": 14 * _T}),
    (r"T4", {"fp16": 65 * _T, "fp32": 8.1 * _T}),
)


def peak_flops(device_name: str, dtype: Precision) -> float | None:
    """The device's peak in FLOP/s (dense), or None if the table does not know the device or it lacks the unit."""
    name = re.sub(r"^(NVIDIA|Tesla)\s+", "", re.sub(r"^NVIDIA\s+Tesla", "Tesla", device_name.strip()))
    if " MIG " in name:
        return None
    for pattern, peaks in _PEAKS:
        if re.fullmatch(pattern, name):
            return peaks.get(dtype)
    return None
