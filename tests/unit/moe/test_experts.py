"""Expert backends against a loop over tokens, with gradients in fp64 by finite differences."""

import pytest
import torch
import torch.nn.functional as F

from moetrain.moe.experts.grouped_mm import GroupedMMExperts
from moetrain.moe.experts.module import Experts
from moetrain.moe.experts.reference import ReferenceExperts

pytestmark = pytest.mark.unit
D, H, E, K = 16, 8, 5, 3


def make(tokens=11, dtype=torch.float64, seed=0, only=None):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, generator=g, dtype=torch.float64)
    expert = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(tokens)]) if tokens else torch.empty(0, K)
    expert = expert.long()
    if only is not None:
        expert = torch.full_like(expert, -1)
        expert[:, 0] = only
    elif tokens:
        expert[torch.rand(tokens, K, generator=g) < 0.3] = -1
    gate = torch.rand(tokens, K, generator=g, dtype=torch.float64)
    w1 = torch.randn(E, 2, H, D, generator=g, dtype=torch.float64)
    w2 = torch.randn(E, D, H, generator=g, dtype=torch.float64)
    return [x.to(dtype).requires_grad_(), expert, *(t.to(dtype).requires_grad_() for t in (gate, w1, w2))]


def by_hand(x, expert, gate, w1, w2):
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros(D, dtype=x.dtype)
        for k in range(K):
            e = int(expert[t, k])
            if e >= 0:
                y = y + gate[t, k] * (w2[e] @ (F.silu(w1[e, 0] @ x[t]) * (w1[e, 1] @ x[t])))
        rows.append(y)
    return torch.stack(rows) if rows else x.new_zeros(0, D)


@pytest.mark.parametrize("case", [{}, {"tokens": 1}, {"only": 4}, {"only": 0, "tokens": 3}])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    # fp32: a dot of 16 terms of size ~4 keeps about 6 digits.
    [(ReferenceExperts(), torch.float64, 1e-12), (GroupedMMExperts(), torch.float32, 2e-5)],
)
def test_output_and_gradients(backend, dtype, tolerance, case):
    exact, got = make(**case), make(**case, dtype=dtype)
    y = by_hand(*exact)
    y_got = backend(*got)
    scale = y.detach().abs().max()
    torch.testing.assert_close(y_got.double(), y, rtol=0, atol=tolerance * scale)
    upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    y.backward(upstream)
    y_got.backward(upstream.to(dtype))
    for mine, reference in zip(got, exact):
        if reference.requires_grad:
            assert mine.grad is not None
            bound = tolerance * reference.grad.abs().max().clamp(min=1.0)
            torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=0, atol=bound)


@pytest.mark.parametrize("backend", [ReferenceExperts(), GroupedMMExperts()])
def test_no_tokens_at_all_still_gives_every_weight_a_zero_gradient(backend):
    x, expert, gate, w1, w2 = make(tokens=0, dtype=torch.float32)
    y = backend(x, expert, gate, w1, w2)
    assert y.shape == (0, D)
    y.sum().backward()
    assert (w1.grad == 0).all()
    assert (w2.grad == 0).all()


def test_the_uninitialised_tail_of_grouped_mm_never_leaks(monkeypatch):
    """Unused slots lie past the last offset, where torch leaves memory as it was: poison it."""
    plain = F.grouped_mm

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, offs):
            ctx.save_for_backward(x, w, offs)
            out = plain(x, w, offs=offs).clone()
            out[int(offs[-1]) :] = float("nan")
            return out

        @staticmethod
        def backward(ctx, g):
            x, w, offs = ctx.saved_tensors
            with torch.enable_grad():
                x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
                gx, gw = torch.autograd.grad(plain(x, w, offs=offs), (x, w), g.contiguous())
            gx = gx.clone()
            gx[int(offs[-1]) :] = float("nan")
            return gx, gw, None

    monkeypatch.setattr(F, "grouped_mm", lambda x, w, offs: Poisoned.apply(x, w, offs))
    args = make(dtype=torch.float32)
    GroupedMMExperts()(*args).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in args if t.requires_grad)


def test_reference_gradients_by_finite_differences():
    x, expert, gate, w1, w2 = make(tokens=3)
    assert torch.autograd.gradcheck(lambda a, b, c, d: ReferenceExperts()(a, expert, b, c, d), (x, gate, w1, w2))


def test_weights_are_cast_once_and_their_gradients_back():
    """Where no FSDP does it (parallel/fsdp.py): the same numbers as a cast by hand, gradients in the master's dtype."""
    x, expert, gate, w1, w2 = make(dtype=torch.float32)
    experts = Experts(E, D, H, ReferenceExperts())
    with torch.no_grad():
        experts.w_gate_up.copy_(w1)
        experts.w_down.copy_(w2)
    experts.compute_dtype = torch.bfloat16
    experts.dispatcher = lambda x_TD, routing, backend, weights: backend(x_TD, *routing, *weights)
    y = experts(x.bfloat16(), (expert, gate))
    by_hand = ReferenceExperts()(x.bfloat16(), expert, gate, w1.bfloat16(), w2.bfloat16())
    assert torch.equal(y, by_hand)
    grads = torch.autograd.grad(y.float().square().sum(), list(experts.parameters()))
    for mine, wanted in zip(grads, torch.autograd.grad(by_hand.float().square().sum(), [w1, w2])):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, wanted)
