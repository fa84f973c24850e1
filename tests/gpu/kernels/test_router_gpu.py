"""The router's kernels on a GPU against the reference in fp64, with the allocator poisoned by NaN first."""

import pytest
import torch
from moetrain_kernels import reference, route_topk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def run(route, logit, k, valid, upstream, **options):
    logit = logit.detach().clone().requires_grad_()
    expert, gate, balance, count = route(logit, k, valid, **options)
    (grad,) = torch.autograd.grad((gate, balance), logit, [u.to(logit.dtype) for u in upstream])
    return [expert, count, gate.detach(), balance.detach(), grad]


def make(tokens, experts, k, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    logit = torch.randn(tokens, experts, device="cuda", generator=g) * 2
    valid = torch.rand(tokens, device="cuda", generator=g) < 0.9
    upstream = [torch.randn(tokens, n, device="cuda", generator=g) for n in (k, experts)]
    return logit, valid, upstream


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("by_logit", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (77, 5, 3), (1000, 64, 8), (513, 130, 6), (4096, 256, 8), (300, 513, 10)])
def test_matches_fp64(shape, biased, by_logit, score):
    tokens, experts, k = shape
    logit, valid, upstream = make(tokens, experts, k)
    options = {"score": score, "by_logit": by_logit, "scale": 2.5, "renormalize": k > 1}
    if biased:
        options["bias_E"] = torch.linspace(-0.2, 0.2, experts, device="cuda")
    poison = [torch.full((n,), float("nan"), device="cuda") for n in (1 << 24, 1 << 20, 1 << 16, 1 << 12)]
    del poison
    got = run(route_topk, logit, k, valid, upstream, **options)
    # Two scores may be equal in fp32 and not in fp64: prescribe the choice, after counting how often it differs.
    want = run(reference.route_topk, logit.double(), k, valid, upstream, **options)
    assert int((got[0] != want[0]).any(1).sum()) <= 1 + tokens // 1000
    want = run(reference.route_topk, logit.double(), k, valid, upstream, given_TK=got[0], **options)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    for mine, theirs in zip(got[2:], want[2:]):
        scale = float(theirs.abs().max().clamp(min=0.1))
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5 * scale)


def test_repeats_bit_for_bit_without_waiting_for_the_device():
    logit, valid, upstream = make(4096, 64, 8)
    first = run(route_topk, logit, 8, valid, upstream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(route_topk, logit, 8, valid, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again))
