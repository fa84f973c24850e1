"""Routers against the formulas of their papers, written out token by token in fp64."""

import math

import pytest
import torch

from moetrain.moe.router import common
from moetrain.moe.router.common import count_experts, top_k
from moetrain.moe.router.sigmoid import SigmoidTopK, limit_groups
from moetrain.moe.router.softmax import SoftmaxTopK
from moetrain.testing.fake import fake_context

pytestmark = pytest.mark.unit
D, E, K = 12, 8, 3


def build(cls, **options):
    torch.manual_seed(1)
    router = cls(D, E, options.pop("top_k", K), **options).double()
    torch.nn.init.normal_(router.weight)
    return router


def inputs(padding=0):
    context = fake_context(2, 9, padding=padding)
    return torch.randn(18, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), context


def test_choosing_after_the_softmax_with_renormalisation_equals_choosing_before():
    x, context = inputs()
    pre = build(SoftmaxTopK, order="pre", renormalize=True)(x, context)
    post = build(SoftmaxTopK, order="post")(x, context)
    assert torch.equal(pre.expert_TK, post.expert_TK)
    torch.testing.assert_close(pre.gate_TK, post.gate_TK, rtol=1e-14, atol=1e-14)


def test_softmax_gates_by_hand():
    x, context = inputs()
    router = build(SoftmaxTopK, order="pre", renormalize=False, scale=2.5)
    routing = router(x, context)
    for t in range(18):
        z = [sum(float(x[t, d] * router.weight[e, d]) for d in range(D)) for e in range(E)]
        total = sum(math.exp(v) for v in z)
        best = sorted(range(E), key=lambda e: -z[e])[:K]
        assert routing.expert_TK[t].tolist() == best
        for slot, e in enumerate(best):
            assert float(routing.gate_TK[t, slot]) == pytest.approx(2.5 * math.exp(z[e]) / total, rel=1e-12)


def test_sigmoid_gates_sum_to_the_scale_and_ignore_the_bias():
    x, context = inputs()
    router = build(SigmoidTopK, scale=2.5)
    plain = router(x, context)
    torch.testing.assert_close(plain.gate_TK.sum(-1), torch.full((18,), 2.5, dtype=torch.float64))
    shifted = router(x, context, torch.full((E,), 0.7))
    assert torch.equal(plain.expert_TK, shifted.expert_TK)
    torch.testing.assert_close(plain.gate_TK, shifted.gate_TK)
    forced = router(x, context, torch.tensor([100.0] * K + [0.0] * (E - K)))
    assert set(forced.expert_TK.flatten().tolist()) == set(range(K))
    score = torch.sigmoid(x @ router.weight.T).gather(-1, forced.expert_TK)
    torch.testing.assert_close(forced.gate_TK, 2.5 * score / score.sum(-1, keepdim=True))


def test_group_limit_masks_with_minus_infinity_even_when_all_scores_are_negative():
    score = -1 - torch.rand(50, E, generator=torch.Generator().manual_seed(0))
    kept = top_k(limit_groups(score, 4, 2), 4)
    groups = kept // 2
    assert all(len(set(row.tolist())) <= 2 for row in groups)
    for t in range(50):
        by_group = sorted(range(4), key=lambda g: -float(score[t, 2 * g : 2 * g + 2].sum()))[:2]
        assert set(groups[t].tolist()) <= set(by_group)


def test_all_groups_is_the_same_as_no_limit():
    x, context = inputs()
    free = build(SigmoidTopK)(x, context)
    limited = build(SigmoidTopK, n_groups=4, topk_groups=4)(x, context)
    assert torch.equal(free.expert_TK, limited.expert_TK)


def test_equal_scores_go_to_the_lowest_index():
    assert top_k(torch.zeros(3, 6), 2).tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("cls", [SoftmaxTopK, SigmoidTopK])
def test_padding_is_neither_routed_nor_counted(cls):
    x, context = inputs(padding=4)
    routing = build(cls)(x, context)
    valid = context.valid_T
    assert (routing.expert_TK[~valid] == -1).all()
    assert (routing.gate_TK[~valid] == 0).all()
    by_hand = [int((routing.expert_TK[valid] == e).sum()) for e in range(E)]
    assert routing.count_E.tolist() == by_hand
    assert sum(by_hand) == int(valid.sum()) * K


def test_counts_of_nothing():
    assert count_experts(torch.full((4, 2), -1), 3).tolist() == [0, 0, 0]
    assert count_experts(torch.empty(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_routing_is_at_least_fp32_under_bf16():
    router = SoftmaxTopK(D, E, K).bfloat16()
    torch.nn.init.normal_(router.weight)
    routing = router(torch.randn(18, D).bfloat16(), fake_context(2, 9))
    assert routing.logit_TE.dtype == routing.gate_TK.dtype == torch.float32


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (SoftmaxTopK, {"top_k": 1, "order": "post"}, "renormalize=false"),
        (SoftmaxTopK, {"top_k": 1}, "renormalize=false"),
        (SoftmaxTopK, {"order": "before"}, "pre"),
        (SigmoidTopK, {"n_groups": 3}, "nearest legal value"),
        (SigmoidTopK, {"n_groups": 4, "topk_groups": 5}, "nearest legal value: 4"),
        (SigmoidTopK, {"n_groups": 8, "topk_groups": 2}, "nearest legal value: 3"),
    ],
)
def test_impossible_options_are_refused(cls, options, words):
    with pytest.raises(ValueError, match=words):
        build(cls, **options)


def test_logits_of_bf16_operands_are_those_of_fp32():
    """What a GPU computes on tensor cores: exact products forward, gradients within 2^-16 of fp32's backward."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(24, 40, generator=g).bfloat16(), torch.randn(6, 40, generator=g).bfloat16()
    upstream = torch.randn(24, 6, generator=g)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    logit = common.HalfLogits.apply(*leaves)
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    wanted = exact[0] @ exact[1].T
    torch.testing.assert_close(logit.double(), wanted, rtol=0, atol=40 * 2**-24 * float(wanted.abs().max()))
    grads = torch.autograd.grad(logit, leaves, upstream)
    for mine, theirs in zip(grads, torch.autograd.grad(wanted, exact, upstream.double())):
        assert mine.dtype == torch.bfloat16
        # One rounding to bf16; an upstream gradient rounded to bf16 first would be off by as much in every term.
        torch.testing.assert_close(mine.double(), theirs, rtol=2**-8 + 2**-12, atol=1e-4)
