"""The collective dispatcher against one process with all experts, in fp64, with different tokens on every rank."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moetrain.moe.dispatch.collective import CollectiveDispatch
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.dispatch.sliced import SlicedDispatch
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.moe.types import Routing
from moetrain.testing import run_ranks
from moetrain.testing.fake import fake_context

pytestmark = pytest.mark.distributed
D, H, E, K, WORLD = 8, 6, 8, 3, 4


def data(rank, case):
    g = torch.Generator().manual_seed(100 + rank)
    tokens = {"uneven": 5 + 3 * rank, "nothing_on_rank_1": 0 if rank == 1 else 7}.get(case, 9)
    expert = torch.rand(tokens, E, generator=g).argsort(-1)[:, :K]
    if case == "all_to_one_expert":
        expert = torch.full((tokens, K), -1)
        expert[:, 1] = 5
    if case == "unused_slots":
        expert[torch.rand(tokens, K, generator=g) < 0.4] = -1
    x = torch.randn(tokens, D, generator=g, dtype=torch.float64).requires_grad_()
    gate = torch.rand(tokens, K, generator=g, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(tokens, D, generator=g, dtype=torch.float64)
    return x, expert, gate, upstream


def weights():
    g = torch.Generator().manual_seed(7)
    return (
        torch.randn(E, 2, H, D, generator=g, dtype=torch.float64),
        torch.randn(E, D, H, generator=g, dtype=torch.float64),
    )


def routing(expert, gate):
    none = torch.empty(0)
    return Routing(expert, gate, none, none, none, none, fake_context(1, max(len(expert), 1)))


def one_rank(case):
    rank = dist.get_rank()
    x, expert, gate, upstream = data(rank, case)
    block = slice(rank * E // WORLD, (rank + 1) * E // WORLD)
    w1, w2 = (w[block].clone().requires_grad_() for w in weights())
    backend = ReferenceExperts()
    dispatcher = CollectiveDispatch(E, dist.group.WORLD)
    y = dispatcher(x, routing(expert, gate), backend, (w1, w2))
    y.backward(upstream)
    return y.detach(), x.grad, gate.grad, w1.grad, w2.grad


@pytest.mark.parametrize("case", ["plain", "uneven", "nothing_on_rank_1", "all_to_one_expert", "unused_slots"])
def test_equals_one_process(case):
    ranks = run_ranks(one_rank, WORLD, case)
    w1, w2 = (w.requires_grad_() for w in weights())
    for rank in range(WORLD):
        x, expert, gate, upstream = data(rank, case)
        y = LocalDispatch()(x, routing(expert, gate), ReferenceExperts(), (w1, w2))
        y.backward(upstream)
        for got, expected in zip(ranks[rank][:3], (y, x.grad, gate.grad)):
            torch.testing.assert_close(got, expected.detach(), rtol=1e-12, atol=1e-12)
    for index, w in ((3, w1), (4, w2)):
        got = torch.cat([r[index] for r in ranks])
        torch.testing.assert_close(got, w.grad, rtol=1e-12, atol=1e-12)


def one_rank_of_slices(case, ep):
    """ep blocks of experts, the width cut over the other ranks: world = ep * etp, etp fastest."""
    rank, etp = dist.get_rank(), WORLD // ep
    x, expert, gate, upstream = data(rank, case)
    block = slice(rank // etp * E // ep, (rank // etp + 1) * E // ep)
    width = slice(rank % etp * H // etp, (rank % etp + 1) * H // etp)
    w1, w2 = weights()
    w1, w2 = w1[block, :, width].clone().requires_grad_(), w2[block, :, width].clone().requires_grad_()
    mesh = init_device_mesh("cpu", (ep, etp), mesh_dim_names=("ep", "etp"))
    inner = CollectiveDispatch(E, mesh.get_group("ep")) if ep > 1 else LocalDispatch()
    backend = ReferenceExperts()
    dispatcher = SlicedDispatch(inner, mesh.get_group("etp"))
    y = dispatcher(x, routing(expert, gate), backend, (w1, w2))
    y.backward(upstream)
    return y.detach(), x.grad, gate.grad, w1.grad, w2.grad, block, width


@pytest.mark.parametrize(
    ("ep", "case"), [(1, "uneven"), (2, "uneven"), (2, "nothing_on_rank_1"), (2, "all_to_one_expert")]
)
def test_slices_of_experts_equal_one_process(ep, case, monkeypatch):
    monkeypatch.setitem(globals(), "H", 8)  # a width that four ranks can share
    ranks = run_ranks(one_rank_of_slices, WORLD, case, ep)
    w1, w2 = (w.requires_grad_() for w in weights())
    for rank in range(WORLD):
        x, expert, gate, upstream = data(rank, case)
        y = LocalDispatch()(x, routing(expert, gate), ReferenceExperts(), (w1, w2))
        y.backward(upstream)
        for got, expected in zip(ranks[rank][:3], (y, x.grad, gate.grad)):
            torch.testing.assert_close(got, expected.detach(), rtol=1e-12, atol=1e-12)
    for *_, got1, got2, block, width in ranks:
        torch.testing.assert_close(got1, w1.grad[block, :, width], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got2, w2.grad[block, :, width], rtol=1e-12, atol=1e-12)


def test_a_token_travels_once_per_rank_not_once_per_expert(monkeypatch):
    def one():
        rows = []
        x, expert, gate, _ = data(dist.get_rank(), "plain")
        count = lambda x, slots, gates, *w: rows.append(len(x)) or x * 0  # noqa: E731
        with torch.no_grad():
            CollectiveDispatch(E, dist.group.WORLD)(x, routing(expert, gate), count, weights())
        return expert, rows[0]

    ranks = run_ranks(one, WORLD)
    expert = torch.cat([r[0] for r in ranks])
    for rank in range(WORLD):
        wanted = sum(any(int(e) // (E // WORLD) == rank for e in row) for row in expert)
        assert ranks[rank][1] == wanted
