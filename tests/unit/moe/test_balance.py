"""Balance plugins against loops over tokens, and the invariants their papers promise."""

import math
from dataclasses import replace

import pytest
import torch

from moetrain.moe.balance.base import attach_loss
from moetrain.moe.balance.bias import SelectionBias
from moetrain.moe.balance.switch import SwitchLoss
from moetrain.moe.balance.z_loss import ZLoss
from moetrain.moe.router.softmax import SoftmaxTopK
from moetrain.moe.types import Routing
from moetrain.testing.fake import fake_context

pytestmark = pytest.mark.unit
D, E, K = 12, 8, 2


def route(rows=3, length=8, padding=2, seed=0, bias=None):
    torch.manual_seed(seed)
    router = SoftmaxTopK(D, E, K).double()
    torch.nn.init.normal_(router.weight)
    return router(torch.randn(rows * length, D, dtype=torch.float64), fake_context(rows, length, padding=padding), bias)


def switch_by_hand(routing: Routing, tokens: list[int]) -> float:
    f, p = [0.0] * E, [0.0] * E
    for t in tokens:
        best = sorted(range(E), key=lambda e: -routing.balance_TE[t, e].item())[:K]
        for e in best:
            f[e] += 1 / (K * len(tokens))
        for e in range(E):
            p[e] += routing.balance_TE[t, e].item() / len(tokens)
    return E * sum(a * b for a, b in zip(f, p))


def test_sequence_scope_is_the_mean_over_rows():
    routing = route(rows=3, length=8, padding=2)
    by_hand = sum(switch_by_hand(routing, [b * 8 + s for s in range(6)]) for b in range(3)) / 3
    assert float(SwitchLoss(E, 0.5).on_routing(routing)) == pytest.approx(0.5 * by_hand, rel=1e-12)


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_batch_scopes_take_all_tokens_at_once(scope):
    routing = route()
    by_hand = switch_by_hand(routing, [b * 8 + s for b in range(3) for s in range(6)])
    assert float(SwitchLoss(E, 0.5, scope).on_routing(routing)) == pytest.approx(0.5 * by_hand, rel=1e-12)


def test_global_batch_counts_accumulate_and_end_with_the_step():
    plugin = SwitchLoss(E, 1.0, "global_batch")
    first, second = route(seed=1), route(seed=2)
    plugin.on_routing(first)
    f = (first.count_E + second.count_E).double()
    expected = E * float((f / f.sum() * second.balance_TE[second.context.valid_T].mean(0)).sum())
    assert float(plugin.on_routing(second)) == pytest.approx(expected, rel=1e-12)
    plugin.before_step(first.count_E)
    assert float(plugin.on_routing(first)) == pytest.approx(
        switch_by_hand(first, [b * 8 + s for b in range(3) for s in range(6)])
    )


def test_uniform_scores_cost_exactly_the_coefficient():
    routing = route()
    uniform = replace(routing, balance_TE=torch.full_like(routing.balance_TE, 1 / E))
    for scope in ("sequence", "micro_batch", "global_batch"):
        assert float(SwitchLoss(E, 0.25, scope).on_routing(uniform)) == pytest.approx(0.25)


def test_switch_counts_what_a_replay_prescribes():
    """Its own top-k is a second discrete choice: free, it would flip by rounding though the routing is replayed."""
    routing = route(rows=1, length=8, padding=0)
    counted_TK = torch.tensor([[0, 1]]).repeat(8, 1)  # everybody on the first two
    replayed = replace(routing, context=replace(routing.context, counted_TK=counted_TK))
    by_hand = E * float(routing.balance_TE.mean(0)[:2].sum()) / 2
    assert float(SwitchLoss(E, 1.0).on_routing(replayed)) == pytest.approx(by_hand, rel=1e-12)
    assert by_hand != pytest.approx(float(SwitchLoss(E, 1.0).on_routing(routing)), rel=1e-3)


def test_switch_sees_through_a_selection_bias():
    bias = torch.tensor([5.0] * K + [0.0] * (E - K))
    assert float(SwitchLoss(E).on_routing(route(bias=bias))) == pytest.approx(float(SwitchLoss(E).on_routing(route())))


@pytest.mark.parametrize("plugin", [SwitchLoss(E, 0.1), ZLoss(E, 0.1)])
def test_splitting_rows_into_micro_batches_changes_neither_loss_nor_gradient(plugin):
    torch.manual_seed(0)
    router = SoftmaxTopK(D, E, K).double()
    torch.nn.init.normal_(router.weight)
    x = torch.randn(4 * 8, D, dtype=torch.float64)
    whole_context = fake_context(4, 8, padding=1)
    whole = plugin.on_routing(router(x, whole_context))
    whole.backward()
    expected, router.weight.grad = router.weight.grad.clone(), None
    parts = []
    for b in range(4):
        context = replace(fake_context(1, 8, padding=1), totals=whole_context.totals)
        loss = plugin.on_routing(router(x[b * 8 : b * 8 + 8], context))
        loss.backward()
        parts.append(float(loss))
    assert sum(parts) == pytest.approx(float(whole), rel=1e-12)
    torch.testing.assert_close(router.weight.grad, expected, rtol=1e-11, atol=1e-13)


def test_z_loss_of_zero_logits():
    routing = replace(route(), logit_TE=torch.zeros(24, E, dtype=torch.float64))
    assert float(ZLoss(E, 0.3).on_routing(routing)) == pytest.approx(0.3 * math.log(E) ** 2)


def test_bias_moves_towards_balance_and_stays_when_balanced():
    plugin = SelectionBias(4, rate=0.5)
    plugin.before_step(torch.tensor([7, 7, 7, 7]))
    assert plugin.bias_E.tolist() == [0, 0, 0, 0]
    plugin.before_step(torch.tensor([10, 2, 4, 4]))
    assert plugin.bias_E.tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert plugin.bias_E.dtype == torch.float32


def test_an_attached_loss_changes_nothing_but_the_gradient():
    w = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    y = attach_loss(x * 2, w.square())
    assert torch.equal(y, x * 2)
    (y.sum() * 0.01).backward()
    assert float(w.grad) == 6.0
    assert x.grad.tolist() == [0.02, 0.02]


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="sequence"):
        SwitchLoss(E, scope="batch")
