"""The reference itself: its gradient by finite differences in fp64, its meaning by a loop over tokens."""

import pytest
import torch
from moetrain_kernels import reference
from torch.nn import functional

pytestmark = pytest.mark.unit


def problem(num_t=5, num_d=4, num_f=3, num_e=3, top_k=2, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    expert = torch.randint(-1, num_e, (num_t, top_k), generator=g)
    return randn(num_t, num_d), expert, randn(num_t, top_k), randn(num_e, 2, num_f, num_d), randn(num_e, num_d, num_f)


def test_gradient_by_finite_differences():
    x, expert, gate, w_up, w_down = (t.requires_grad_() if t.is_floating_point() else t for t in problem())
    assert torch.autograd.gradcheck(
        lambda x, gate, w_up, w_down: reference.moe_experts(x, expert, gate, w_up, w_down), (x, gate, w_up, w_down))


def test_is_the_sum_over_slots():
    x, expert, gate, w_up, w_down = problem(num_t=9, num_e=4, top_k=3)
    want = torch.zeros_like(x)
    for t in range(9):
        for k in range(3):
            e = int(expert[t, k])
            if e >= 0:
                h = functional.silu(w_up[e, 0] @ x[t]) * (w_up[e, 1] @ x[t])
                want[t] += gate[t, k] * (w_down[e] @ h)
    torch.testing.assert_close(reference.moe_experts(x, expert, gate, w_up, w_down), want)


def test_kernel_by_kernel_backward_equals_autograd():
    x, expert, gate, w_up, w_down = problem(num_t=11, num_d=6, num_f=5, num_e=4, top_k=3)
    leaves = [t.clone().requires_grad_() for t in (x, gate, w_up, w_down)]
    dy = torch.randn_like(x)
    y = reference.moe_experts(leaves[0], expert, *leaves[1:])
    want = torch.autograd.grad(y, leaves, dy)
    rows = reference.sort_rows(expert, 4)
    token_R = rows.slot_R // 3
    h, _ = reference.up_swiglu(x, rows, w_up)
    b = reference.grouped_gemm(dy[token_R], rows, w_down.transpose(1, 2))
    dh, gated_a, dgate_R = reference.swiglu_grad(b, gate, rows, h)
    dx_R = reference.grouped_gemm(dh, rows, w_up.flatten(1, 2).transpose(1, 2))
    dgate = torch.zeros_like(gate).reshape(-1).index_copy(0, rows.slot_R, dgate_R).view_as(gate)
    got = (reference.combine(dx_R, rows.row_TK), dgate, reference.weight_grad(dh, x[token_R], rows).view_as(w_up),
           reference.weight_grad(dy[token_R], gated_a, rows))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("num_t", [0, 3])
def test_no_active_slot_gives_zeros(num_t):
    x, expert, gate, w_up, w_down = problem(num_t=num_t)
    y = reference.moe_experts(x.requires_grad_(), torch.full_like(expert, -1), gate, w_up, w_down)
    assert y.shape == x.shape
    assert not y.any()
