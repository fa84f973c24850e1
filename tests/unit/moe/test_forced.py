"""Forced routing against counts: even load is exactly even, Zipf's law has its shape, and gradients still flow."""

import pytest
import torch

from moetrain.moe.router.forced import ForcedRouter
from moetrain.testing.fake import fake_context

pytestmark = pytest.mark.unit
D, E, K = 8, 16, 4


def route(distribution, rows=4, length=256):
    torch.manual_seed(0)
    router = ForcedRouter(D, E, K, distribution)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(rows * length, D, requires_grad=True)
    return router, router(x, fake_context(rows, length))


def test_balanced_is_exactly_even():
    _, routing = route("balanced")
    assert routing.count_E.tolist() == [4 * 256 * K // E] * E


def test_zipf_orders_the_experts_and_chooses_each_once():
    _, routing = route("zipf")
    count = routing.count_E.double()
    assert count[:4].sum() > 1.3 * count[-4:].sum()
    assert all(len(set(row)) == K for row in routing.expert_TK.tolist())


@pytest.mark.parametrize("distribution", ["balanced", "zipf"])
def test_gates_sum_to_one_and_the_router_has_a_gradient(distribution):
    router, routing = route(distribution)
    torch.testing.assert_close(routing.gate_TK.sum(-1), torch.ones(4 * 256))
    routing.gate_TK.square().sum().backward()
    assert router.weight.grad.abs().sum() > 0


def test_an_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match=r"router\.distribution=.even."):
        ForcedRouter(D, E, K, "even")
