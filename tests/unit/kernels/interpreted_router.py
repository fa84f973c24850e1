"""The router's kernels under Triton's interpreter, against the reference of the same name in fp64.

Needs TRITON_INTERPRET=1 from the start of the process: test_interpreted.py runs this file in one of its own.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moetrain_kernels import launch, reference, route_topk

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not launch.interpreting(), reason="needs TRITON_INTERPRET=1"),
]


def run(route, logit, k, valid, weights, **options):
    logit = logit.detach().clone().requires_grad_()
    expert, gate, balance, count = route(logit, k, valid, **options)
    upstream = [weight.to(logit.dtype) for weight in weights]
    (grad,) = torch.autograd.grad((gate, balance), logit, upstream)
    return expert, count, gate.detach(), balance.detach(), grad


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_equals_the_reference(data):
    experts = data.draw(st.integers(1, 40), "E")
    tokens, k = data.draw(st.integers(1, 70), "T"), data.draw(st.integers(1, min(experts, 9)), "K")
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 9), "seed"))
    logit = torch.randn(tokens, experts, generator=g) * data.draw(st.sampled_from([0.1, 3.0, 30.0]), "spread")
    valid = torch.rand(tokens, generator=g) < data.draw(st.sampled_from([0.0, 0.7, 1.0]), "valid")
    options = {
        "score": data.draw(st.sampled_from(["softmax", "sigmoid"])),
        "renormalize": data.draw(st.booleans()),
        "by_logit": data.draw(st.booleans()),
        "scale": data.draw(st.sampled_from([1.0, 2.5])),
    }
    if data.draw(st.booleans(), "bias"):
        options["bias_E"] = torch.randn(experts, generator=g) * 0.3
    # Where a wide spread makes scores equal in fp32 but not in fp64, the choice itself is compared in fp32.
    given_TK, *_ = reference.route_topk(logit, k, torch.ones(tokens, dtype=torch.bool), **options)
    weights = [torch.randn(tokens, k, generator=g), torch.randn(tokens, experts, generator=g)]
    got = run(route_topk, logit, k, valid, weights, **options)
    exact = {key: value.double() if torch.is_tensor(value) else value for key, value in options.items()}
    want = run(reference.route_topk, logit.double(), k, valid, weights, given_TK=given_TK, **exact)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    for mine, theirs in zip(got[2:], want[2:]):
        # fp32 exponentials of numbers up to 100 are good to 100 eps; quotients and sums over 40 terms add a few.
        # Gradients are differences of terms of the size of what comes from upstream, about 1: eps of that is lost.
        scale = float(theirs.abs().max().clamp(min=0.1))
        torch.testing.assert_close(mine.double(), theirs, rtol=3e-5, atol=3e-5 * scale)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_prescribed_experts_replace_the_own_choice(score):
    g = torch.Generator().manual_seed(0)
    logit, valid = torch.randn(20, 8, generator=g), torch.arange(20) < 17
    prescribed = torch.stack([torch.randperm(8, generator=g)[:3] for _ in range(20)])
    prescribed[4] = -1
    weights = [torch.randn(20, 3, generator=g), torch.randn(20, 8, generator=g)]
    options = {"score": score, "given_TK": prescribed}
    got = run(route_topk, logit, 3, valid, weights, **options)
    want = run(reference.route_topk, logit.double(), 3, valid, weights, **options)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[0][:4], prescribed[:4])
    for mine, theirs in zip(got[2:], want[2:]):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


def test_equal_scores_go_to_the_lowest_id():
    expert, *_ = route_topk(torch.zeros(3, 6), 3, torch.ones(3, dtype=torch.bool))
    assert expert.tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("part", [0, 1])
def test_one_gradient_alone(part):
    g = torch.Generator().manual_seed(0)
    logit, valid = torch.randn(9, 5, generator=g), torch.ones(9, dtype=torch.bool)
    grads = []
    for route, dtype in ((route_topk, torch.float32), (reference.route_topk, torch.float64)):
        leaf = logit.to(dtype).requires_grad_()
        result = route(leaf, 2, valid)[1 + part]
        grads.append(torch.autograd.grad((result * torch.arange(result.numel()).view_as(result)).sum(), leaf)[0])
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-5, atol=1e-6)


def test_no_tokens():
    expert, gate, balance, count = route_topk(torch.empty(0, 4), 2, torch.ones(0, dtype=torch.bool))
    assert expert.shape == gate.shape == (0, 2)
    assert balance.shape == (0, 4)
    assert count.tolist() == [0] * 4


def test_refuses_what_does_not_fit():
    valid = torch.ones(3, dtype=torch.bool)
    for logit, k, options, word in [
        (torch.zeros(3, 4).double(), 2, {}, "fp32"),
        (torch.zeros(3, 4), 5, {}, "k=5"),
        (torch.zeros(3, 4), 2, {"score": "tanh"}, "softmax"),
    ]:
        with pytest.raises(ValueError, match=word):
            route_topk(logit, k, valid, **options)
