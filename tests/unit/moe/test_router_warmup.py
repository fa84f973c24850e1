"""Routing warm-up: the formula by hand, its noise, and that nothing of it is left afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moetrain.checkpoint.hf.translate import choose as choose_family
from moetrain.config.compose import load_config
from moetrain.config.plugins import check_plugins
from moetrain.moe.router.common import top_k
from moetrain.moe.router.softmax import SoftmaxTopK
from moetrain.moe.router.warmup import WarmupSoftmaxTopK, token_noise
from moetrain.testing.fake import fake_context

pytestmark = pytest.mark.unit
D, E, K = 12, 8, 2


def build(cls=WarmupSoftmaxTopK, **options):
    torch.manual_seed(1)
    router = cls(D, E, K, **options).double()
    torch.nn.init.normal_(router.weight)
    return router


def inputs(rows=2, length=9, vocab=100):
    context = fake_context(rows, length, vocab=vocab)
    return torch.randn(rows * length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), context


@pytest.mark.parametrize("order", ["pre", "post"])
def test_the_formula_by_hand(order):
    x, context = inputs()
    context = replace(context, step=3)
    router = build(warmup_steps=4, order=order)
    routing, noise = router(x, context), token_noise(context, E)
    for t in range(len(x)):
        z = router.weight.detach() @ x[t]
        mixed = 0.75 * z + 0.25 * (z.mean() + z.std(correction=0) * noise[t])
        chosen = mixed.argsort(descending=True)[:K]
        weights = mixed[chosen].exp() / mixed[chosen].exp().sum()
        assert routing.expert_TK[t].tolist() == chosen.tolist()
        torch.testing.assert_close(routing.gate_TK[t].detach(), weights, rtol=1e-12, atol=1e-12)


def test_afterwards_and_in_evaluations_it_is_the_plain_router():
    x, context = inputs()
    plain, warm = build(SoftmaxTopK), build(warmup_steps=4)
    want = plain(x, context)
    early = warm(x, context)
    assert not torch.equal(early.expert_TK, want.expert_TK)
    with torch.no_grad():
        assert torch.equal(warm(x, context).expert_TK, want.expert_TK)
    late = warm(x, replace(context, step=4))
    assert torch.equal(late.expert_TK, want.expert_TK)
    assert torch.equal(late.gate_TK, want.gate_TK)
    assert torch.equal(build(warmup_steps=0)(x, context).expert_TK, want.expert_TK)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_the_selection_score_is_the_one_that_chose(order):
    x, context = inputs()
    bias = torch.linspace(-1.0, 1.0, E, dtype=torch.float64)
    routing = build(warmup_steps=4, order=order)(x, replace(context, step=3), bias)
    assert torch.equal(top_k(routing.selection_TE, K), routing.expert_TK)


def test_at_first_every_expert_gets_its_share():
    x, context = inputs(rows=100, length=200, vocab=50_000)
    x[:, 0] = 20.0  # every token prefers the same experts
    counts = build(warmup_steps=10)(x, context).count_E
    share = K / E
    deviation = (20_000 * share * (1 - share)) ** 0.5  # binomial
    assert (counts - 20_000 * share).abs().max() < 4 * deviation
    assert build(SoftmaxTopK)(x, context).count_E.max() > 15_000


def test_noise_is_normal_and_belongs_to_the_token():
    _, context = inputs(rows=100, length=200, vocab=50_000)
    noise = token_noise(context, E)
    n = noise.numel()
    assert noise.mean().abs() < 4 / n**0.5
    assert noise.std() == pytest.approx(1.0, abs=4 / (2 * n) ** 0.5)
    assert noise.abs().max() < 7
    assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max() < 4.5 / 20_000**0.5
    half = replace(context, token_BS=context.token_BS[50:], position_BS=context.position_BS[50:])
    assert torch.equal(token_noise(half, E), noise[10_000:])  # whichever rank holds it
    later = token_noise(replace(context, step=1), E)
    assert torch.corrcoef(torch.stack([noise.flatten(), later.flatten()]))[0, 1].abs() < 4 / n**0.5


def test_tied_noise_keeps_groups_whole():
    x, context = inputs()
    router = WarmupSoftmaxTopK(D, E, 4, warmup_steps=4, tied=4).double()
    with torch.no_grad():
        router.weight.copy_(torch.randn(2, D).double().repeat_interleave(4, dim=0))
    groups = router(x, context).expert_TK // 4
    assert torch.equal(groups, groups[:, :1].expand_as(groups))
    assert len(groups.unique()) == 2


def test_the_router_learns_from_its_own_share():
    x, context = inputs()
    norms = []
    for step in (0, 2):
        router = build(warmup_steps=4)
        (router(x, replace(context, step=step)).gate_TK * torch.arange(K)).sum().backward()
        norms.append(float(router.weight.grad.norm()))
    assert norms[0] == 0
    assert norms[1] > 0


def test_it_is_a_choice_of_the_configuration_and_leaves_nothing_in_an_export():
    config = load_config(["router=softmax_warmup", "optim=adamw_restarts"])
    check_plugins(config)
    assert choose_family(config).name == choose_family(load_config([])).name == "mixtral"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"warmup_steps": -1}, "warmup_steps=-1; nearest legal value: 0"), ({"tied": 3}, "tied=3 does not divide 8")],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
