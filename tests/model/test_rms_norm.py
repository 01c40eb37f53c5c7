"""The hand-written RMS norm against torch's own and against numerical differentiation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from chatgot.model.rms_norm import rms_norm


@pytest.mark.parametrize("shape", [(3, 5, 16), (2, 7, 4, 8), (6, 12)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4], ids=["near eps", "ordinary", "large"])
def test_values_and_gradients_equal_torchs(shape: tuple[int, ...], scale: float):
    generator = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(shape, generator=generator)).requires_grad_()
    weight = torch.randn(shape[-1], generator=generator, requires_grad=True)
    grad = torch.randn(shape, generator=generator)
    ours, theirs = rms_norm(x, weight), F.rms_norm(x, (shape[-1],), weight, 1e-6)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(theirs, (x, weight), grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 / scale)


def test_a_zero_vector_gives_finite_gradients():
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_input_is_normalised_in_fp32_and_keeps_its_dtype(dtype: torch.dtype):
    x = (
        (300 * torch.randn(4, 512, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    )  # squares overflow fp16
    weight = torch.ones(512, dtype=dtype, requires_grad=True)
    y = rms_norm(x, weight)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), F.rms_norm(x.float(), (512,), weight.float(), 1e-6), rtol=0.01, atol=0.001)
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == dtype


def test_an_fp32_weight_does_not_widen_a_16_bit_input():
    """Under autocast the projections are 16-bit and the weights fp32."""
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    y = rms_norm(x, weight)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert weight.grad is not None
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


def test_second_derivatives_are_refused_instead_of_wrong():
    x = torch.randn(2, 8, requires_grad=True)
    (first,) = torch.autograd.grad(rms_norm(x, torch.ones(8)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
