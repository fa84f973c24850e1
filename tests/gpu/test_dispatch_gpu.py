"""Dispatchers between two GPUs: equal to one process, and no waiting host where none is promised."""

import warnings

import pytest
import torch
import torch.distributed as dist

from moetrain.moe.dispatch import allgather, collective, copy_engine
from moetrain.moe.dispatch.base import ExchangeShape
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.experts.grouped_mm import GroupedMMExperts
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.moe.types import Routing
from moetrain.testing import run_ranks
from moetrain.testing.fake import fake_context

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
T, D, H, E, K, LAYERS = 300, 64, 32, 8, 3, 6
TRANSPORTS = {
    **{f"collective {chunks}": (collective, chunks) for chunks in (1, 2, 4)},
    "allgather 2": (allgather, 2),
    **{f"copy_engine {chunks}": (copy_engine, chunks) for chunks in (2, 3, 4)},
}


def data(rank, layer, dtype):
    g = torch.Generator().manual_seed(10 * layer + rank)
    tokens = T - 50 * rank * (layer % 2)  # uneven in every other layer
    expert = torch.rand(tokens, E, generator=g).argsort(-1)[:, :K]
    expert[torch.rand(tokens, K, generator=g) < 0.2] = -1
    x, dy = (torch.randn(tokens, D, generator=g, dtype=torch.float64).to("cuda", dtype) for _ in range(2))
    gate = torch.rand(tokens, K, generator=g, dtype=torch.float64).to("cuda", torch.promote_types(dtype, torch.float32))
    return x.requires_grad_(), expert.cuda(), gate.requires_grad_(), dy


def weights(dtype):
    g = torch.Generator().manual_seed(7)
    up = torch.randn(E, 2, H, D, generator=g, dtype=torch.float64)
    return tuple(t.to("cuda", dtype) for t in (up, torch.randn(E, D, H, generator=g, dtype=torch.float64)))


def routing(expert, gate):
    none = torch.empty(0)
    return Routing(expert, gate, none, none, none, none, fake_context(1, 1))


def make(name, dtype):
    module, chunks = TRANSPORTS[name]
    return module.build(E, dist.group.WORLD, ExchangeShape(T, D, K, dtype, "cuda"), chunks)


def worst_error(name):
    """Several layers forward, then backward; one rank is kept busy so that it lags. Against all experts here."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dispatcher, whole = make(name, torch.float64), [w.requires_grad_() for w in weights(torch.float64)]
    own = slice(rank * E // ranks, (rank + 1) * E // ranks)
    w = tuple(t.detach()[own].clone().requires_grad_() for t in whole)
    done, worst = [], 0.0
    for layer in range(LAYERS):
        x, expert, gate, dy = data(rank, layer, torch.float64)
        if layer % ranks == rank:
            torch.cuda._sleep(20_000_000)
        done.append((dispatcher(x, routing(expert, gate), ReferenceExperts(), w), x, gate, dy))
    for y, _, _, dy in reversed(done):
        y.backward(dy)
    for layer, (y, x, gate, dy) in enumerate(done):
        x2, expert, gate2, _ = data(rank, layer, torch.float64)
        y2 = LocalDispatch()(x2, routing(expert, gate2), ReferenceExperts(), whole)
        y2.backward(dy)
        for got, want in ((y, y2), (x.grad, x2.grad), (gate.grad, gate2.grad)):
            worst = max(worst, float((got - want).abs().max()))
    for got, want in zip(w, whole):
        dist.all_reduce(want.grad)
        worst = max(worst, float((got.grad - want.grad[own]).abs().max() / want.grad.abs().max()))
    return worst


@pytest.mark.parametrize("name", TRANSPORTS)
def test_equals_one_process(name):
    assert max(run_ranks(worst_error, 2, name, backend="nccl")) < 1e-10


def host_waits(name):
    """Warnings of torch's own watch over host synchronisations, of two layers forward and backward."""
    w = tuple(t[: E // 2].clone().requires_grad_() for t in weights(torch.bfloat16))
    dispatcher = make(name, torch.bfloat16)
    x, expert, gate, dy = data(dist.get_rank(), 0, torch.bfloat16)

    def layer():
        dispatcher(x, routing(expert, gate), GroupedMMExperts(), w).backward(dy)

    layer()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer()
        layer()
    torch.cuda.set_sync_debug_mode("default")
    return [str(w.message) for w in caught if "synchroniz" in str(w.message)]


@pytest.mark.parametrize(("name", "allowed"), [("collective 4", 2), ("allgather 2", 0), ("copy_engine 3", 0)])
def test_host_synchronisations(name, allowed):
    for waits in run_ranks(host_waits, 2, name, backend="nccl"):
        assert len(waits) <= allowed, waits
