"""Norm and clipping of plain tensors against torch; the meshes' part is in tests/distributed/optim."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from moetrain.optim.clip import clip_, clip_for, grad_norm

pytestmark = pytest.mark.unit


def _parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in [(3, 4), (5,), (2, 2), ()]]
    for parameter in parameters[:-1]:  # the last one got no gradient: it counts as zero
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return parameters


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_equals_torch(max_norm):
    parameters, reference = _parameters(), _parameters()
    norm = grad_norm(parameters)
    clip_(parameters, max_norm, norm)
    expected = clip_grad_norm_(reference, max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
    for p, q in zip(parameters[:-1], reference[:-1]):
        torch.testing.assert_close(p.grad, q.grad, rtol=3e-6, atol=0)  # torch adds 1e-6 to the norm
    assert grad_norm(parameters).item() == pytest.approx(min(max_norm, expected.item()), rel=1e-14)


def test_bf16_is_summed_wider():
    parameter = torch.nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    assert grad_norm([parameter]).dtype == torch.float32
    assert grad_norm([parameter]).item() == pytest.approx(100_000**0.5, rel=1e-6)


def test_zero_gradients_and_no_parameters():
    parameters = _parameters()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    clip_(parameters, 1.0, grad_norm(parameters))
    assert all(torch.count_nonzero(p.grad) == 0 and p.grad.isfinite().all() for p in parameters)
    assert grad_norm([]).item() == 0


def test_off_and_refused():
    parameters = _parameters()
    before = parameters[0].grad.clone()
    clip_(parameters, 0.0, grad_norm(parameters))
    assert torch.equal(parameters[0].grad, before)
    with pytest.raises(ValueError, match=r"max_grad_norm is -1.*nearest legal value is 0"):
        clip_(parameters, -1, grad_norm(parameters))


def test_an_optimizer_that_divides_clips_itself():
    class Divides:
        divides, grad_divisor = True, None

    optimizer = Divides()
    parameter = torch.nn.Parameter(torch.ones(4))
    for size, divisor in ((2.0, 2.0), (0.25, 1.0)):  # norm 4, then norm 0.5, against 2
        parameter.grad = torch.full((4,), size)
        clip_for(optimizer, [parameter], 2.0, grad_norm([parameter]))
        assert float(optimizer.grad_divisor) == divisor
        assert torch.equal(parameter.grad, torch.full((4,), size))
    parameter.grad = torch.full((4,), 2.0)
    clip_for(torch.optim.SGD([parameter], lr=1.0), [parameter], 2.0, grad_norm([parameter]))
    torch.testing.assert_close(parameter.grad, torch.ones(4))
