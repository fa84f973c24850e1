"""The expert layer in fp16, and on slices of weights, under Triton's interpreter, against fp64.

Needs TRITON_INTERPRET=1 from the start of the process: test_interpreted.py runs this file in one of its own.
"""

import pytest
import torch
from moetrain_kernels import launch, moe_experts, reference

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not launch.interpreting(), reason="needs TRITON_INTERPRET=1"),
]
T, D, F, E, K = 21, 32, 24, 3, 2


def problem(dtype):
    g = torch.Generator().manual_seed(0)
    expert = torch.randint(-1, E, (T, K), generator=g)

    def randn(*size, scale=1.0):
        return (torch.randn(*size, generator=g) * scale).to(dtype)

    x, gate = randn(T, D), torch.rand(T, K, generator=g)
    return expert, [x, gate, randn(E, 2, F, D, scale=D**-0.5), randn(E, D, F, scale=F**-0.5)], randn(T, D)


def run(layer, expert, leaves, dy):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = layer(leaves[0], expert, *leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


# bf16 is for GPUs: the interpreter multiplies its bit patterns as integers.
# About eight roundings to the dtype lie between x and a weight's gradient: sqrt(8) of one, and a margin.
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_dtype(dtype):
    expert, leaves, dy = problem(dtype)
    got = run(moe_experts, expert, leaves, dy)
    want = run(reference.moe_experts, expert, [leaf.double() for leaf in leaves], dy.double())
    limit = 4 * torch.finfo(dtype).eps / 2 + 1e-5
    for name, mine, exact in zip(("y", "dx", "dgate", "dw_up", "dw_down"), got, want):
        assert mine.dtype == (torch.float32 if name == "dgate" else dtype)
        assert ((mine.double() - exact).norm() / exact.norm()) < limit, name


@pytest.mark.parametrize("dim", ["F", "E"])
def test_slices_of_weights_add_up(dim):
    """What expert (tensor) parallelism keeps on a rank: views of the weights, whose results and gradients add up."""
    expert, leaves, dy = problem(torch.float32)
    whole = run(moe_experts, expert, leaves, dy)
    parts = []
    for start in (0, F // 2) if dim == "F" else (0, 1, 2):
        x, gate, w_up, w_down = (leaf.detach().clone().requires_grad_() for leaf in leaves)
        if dim == "F":
            mine, up, down = expert, w_up[:, :, start : start + F // 2], w_down[:, :, start : start + F // 2]
            assert not down.is_contiguous()
        else:
            mine, up, down = expert - start, w_up[start : start + 1], w_down[start : start + 1]
        y = moe_experts(x, mine, gate, up, down)
        parts.append([y.detach(), *torch.autograd.grad(y, (x, gate, w_up, w_down), dy)])
    for exact, *mine in zip(whole, *parts):
        torch.testing.assert_close(sum(mine), exact, rtol=1e-4, atol=1e-5)
