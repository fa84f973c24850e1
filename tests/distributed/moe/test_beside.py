"""Shared experts beside an exchange: done while rows travel, and the same numbers as after it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moetrain.moe.beside import Beside
from moetrain.moe.dispatch import allgather, collective, exchange
from moetrain.moe.dispatch.base import ExchangeShape
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.moe.kept import Kept
from moetrain.moe.shared import SharedExperts
from moetrain.testing import run_ranks
from moetrain.testing.fake import fake_experts, fake_routing, fake_tokens, own_experts

pytestmark = pytest.mark.distributed
WORLD, E, K, D, H, T = 2, 4, 2, 8, 6, 12
SHAPE = ExchangeShape(T, D, K, torch.float64, "cpu")


def shared_experts(frozen=False):
    torch.manual_seed(3)
    shared = SharedExperts(D, 5, gated=True).double()
    for parameter in shared.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
        parameter.requires_grad_(not frozen)
    return shared


def passes(module, chunks, way, frozen=False):
    """y, dx, dgate, dw of the routed and of the shared experts. way: after (the exchange), beside, or recomputed."""
    dispatcher = module.build(E, dist.group.WORLD, SHAPE, chunks)
    x, expert, gate, dy = fake_tokens(T, D, E, K, seed=10 + dist.get_rank(), unused=0.2)
    weights, shared = own_experts(fake_experts(E, D, H)), shared_experts(frozen)

    def layer(x, gate, kept=None):
        beside = None if way == "after" else Beside(shared)
        y = dispatcher(x, fake_routing(expert, gate, kept=kept, beside=beside), ReferenceExperts(), weights)
        assert beside is None or beside.done
        return y + shared(x) if beside is None else y

    y = checkpoint(layer, x, gate, Kept(), use_reentrant=False) if way == "recomputed" else layer(x, gate)
    y.backward(dy)
    return [y.detach(), x.grad, gate.grad, *(w.grad for w in weights), *(p.grad for p in shared.parameters())]


def compared(module, chunks, frozen):
    want = passes(module, chunks, "after", frozen)
    for way in ("beside", "recomputed"):
        for got, expected in zip(passes(module, chunks, way, frozen), want, strict=True):
            assert (got is None) == (expected is None)
            if got is not None:
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("module", "chunks"), [(collective, 1), (collective, 3), (allgather, 2)])
def test_nothing_but_the_order_of_work_changes(module, chunks, frozen):
    run_ranks(compared, WORLD, module, chunks, frozen)


def order_of_work(chunks):
    """What the host does in which order, of one training step of a layer."""
    done, start = [], exchange.in_turn

    class Noted(SharedExperts):
        def forward(self, x_TD):
            done.append("shared experts")
            y = super().forward(x_TD)
            if y.requires_grad:
                y.register_hook(lambda dy: done.append("their gradients"))
            return y

    def in_turn(trip, work, device, begin, finish, last):
        def noted(name, function):
            return lambda piece: done.append(f"{name} {piece}") or function(piece)

        start(trip, work, device, noted("begin", begin), noted("finish", finish), last)
        done.append("rows are home")

    exchange.in_turn = in_turn  # in a rank of its own
    x, expert, gate, dy = fake_tokens(T, D, E, K, seed=dist.get_rank())
    routing = fake_routing(expert, gate, beside=Beside(Noted(D, 5, gated=False).double()))
    dispatcher = collective.build(E, dist.group.WORLD, SHAPE, chunks)
    dispatcher(x, routing, ReferenceExperts(), own_experts(fake_experts(E, D, H))).backward(dy)
    return done


@pytest.mark.parametrize("chunks", [1, 2])
def test_they_hide_the_last_way_home_and_back_the_first_way_out(chunks):
    stays, travels = ["0"] * (chunks - 1), str(chunks - 1)
    work = [*(f"begin {p}" for p in stays), f"begin {travels}", f"finish {travels}"]
    home = [*(f"finish {p}" for p in stays), "rows are home"]
    want = [*work, "shared experts", *home, "their gradients", *work, *home]
    assert run_ranks(order_of_work, WORLD, chunks) == [want] * WORLD


def test_a_dispatcher_that_knows_nothing_of_it_leaves_it_undone():
    beside = Beside(shared_experts())
    routing = fake_routing(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), beside=beside)
    LocalDispatch()(torch.ones(2, D).double(), routing, lambda x, *rest: x, ())
    assert not beside.done
