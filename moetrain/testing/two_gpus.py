"""What the GPU tests of dispatchers run on each rank; spawned ranks import it, so it is no test module."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.nodes import find_nodes, node_group
from moetrain.moe.dispatch import allgather, collective, copy_engine
from moetrain.moe.dispatch.base import Dispatcher, ExchangeShape, Weights
from moetrain.moe.dispatch.chunks import Chunks
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.dispatch.two_level import TwoLevelDispatch
from moetrain.moe.experts.grouped_mm import GroupedMMExperts
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.moe.experts.triton import TritonExperts
from moetrain.moe.types import Routing
from moetrain.testing.fake import fake_routing
from moetrain.testing.problem import Layer, Problem, Shape, distance, make_problem, own_share

T, D, H, E, K, LAYERS = 300, 64, 32, 8, 3, 6


class TwoLevels:
    """In place of moe/dispatch/two_level.py, which refuses nodes of one rank: with two GPUs one level at a time."""

    def __init__(self, local: int) -> None:
        self.local = local

    def build(self, n_experts: int, group: dist.ProcessGroup, shape: ExchangeShape, chunks: int) -> TwoLevelDispatch:
        """`local` consecutive GPUs to a node; the copy engines inside where there are several."""
        nodes = find_nodes(group, "cuda", self.local)
        landing = replace(shape, tokens=shape.tokens * len(nodes))
        inside: Dispatcher = LocalDispatch()
        if self.local > 1:
            inside = copy_engine.build(n_experts // len(nodes), node_group(group, nodes), landing, 2)
        return TwoLevelDispatch(n_experts, group, self.local, inside, Chunks("two_level", chunks, (), group))


TRANSPORTS: dict[str, tuple[Any, int]] = {
    **{f"collective {chunks}": (collective, chunks) for chunks in (1, 2, 4)},
    "allgather 2": (allgather, 2),
    **{f"copy_engine {chunks}": (copy_engine, chunks) for chunks in (2, 3, 4)},
    **{f"two_level {chunks}, nodes of {local}": (TwoLevels(local), chunks) for local in (1, 2) for chunks in (1, 3)},
}


def data(rank: int, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, experts, gates, dy."""
    g = torch.Generator().manual_seed(10 * layer + rank)
    tokens = T - 50 * rank * (layer % 2)  # uneven in every other layer
    expert = torch.rand(tokens, E, generator=g).argsort(-1)[:, :K]
    expert[torch.rand(tokens, K, generator=g) < 0.2] = -1
    x, dy = (torch.randn(tokens, D, generator=g, dtype=torch.float64).to("cuda", dtype) for _ in range(2))
    gate = torch.rand(tokens, K, generator=g, dtype=torch.float64).to("cuda", torch.promote_types(dtype, torch.float32))
    return x.requires_grad_(), expert.cuda(), gate.requires_grad_(), dy


def weights(dtype: torch.dtype) -> Weights:
    """Of all experts."""
    g = torch.Generator().manual_seed(7)
    up = torch.randn(E, 2, H, D, generator=g, dtype=torch.float64)
    down = torch.randn(E, D, H, generator=g, dtype=torch.float64)
    return up.to("cuda", dtype), down.to("cuda", dtype)


def routing(expert: Tensor, gate: Tensor) -> Routing:
    """Nothing but experts and gates."""
    return fake_routing(expert, gate)


def make(name: str, dtype: torch.dtype) -> Dispatcher:
    """One of TRANSPORTS."""
    module, chunks = TRANSPORTS[name]
    return module.build(E, dist.group.WORLD, ExchangeShape(T, D, K, dtype, "cuda"), chunks)


def worst_error(name: str) -> float:
    """Several layers forward, then backward; ranks take turns in lagging. Against all experts here, largest entry 1."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dispatcher, whole = make(name, torch.float64), weights(torch.float64)
    own = slice(rank * E // ranks, (rank + 1) * E // ranks)
    dw_whole, done, worst = [torch.zeros_like(w) for w in whole], [], 0.0
    dw_own = [torch.zeros_like(w[own]) for w in whole]
    for layer in range(LAYERS):
        x, expert, gate, dy = data(rank, layer, torch.float64)
        w = (whole[0][own].clone().requires_grad_(), whole[1][own].clone().requires_grad_())
        if layer % ranks == rank:
            torch.cuda._sleep(20_000_000)
        done.append((dispatcher(x, routing(expert, gate), ReferenceExperts(), w), x, expert, gate, dy, w))
    for y, x, expert, gate, dy, w in reversed(done):
        got = torch.autograd.grad(y, (x, gate, *w), dy)
        w_all = (whole[0].clone().requires_grad_(), whole[1].clone().requires_grad_())
        y_all = LocalDispatch()(x, routing(expert, gate), ReferenceExperts(), w_all)
        want = torch.autograd.grad(y_all, (x, gate, *w_all), dy)
        for mine, theirs in ((y, y_all), *zip(got[:2], want[:2])):
            worst = max(worst, float((mine - theirs).detach().abs().max() / theirs.detach().abs().max()))
        dw_own = [total + part for total, part in zip(dw_own, got[2:])]
        dw_whole = [total + part for total, part in zip(dw_whole, want[2:])]
    for mine, theirs in zip(dw_own, dw_whole):
        dist.all_reduce(theirs)
        worst = max(worst, float((mine - theirs[own]).abs().max() / theirs.abs().max()))
    return worst


def host_waits(name: str) -> list[str]:
    """Warnings of torch's own watch over host synchronisations, of two layers forward and backward."""
    up, down = weights(torch.bfloat16)
    first = E // dist.get_world_size()
    w = (up[:first].clone().requires_grad_(), down[:first].clone().requires_grad_())
    dispatcher = make(name, torch.bfloat16)
    x, expert, gate, dy = data(dist.get_rank(), 0, torch.bfloat16)

    def layer() -> None:
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


RING = Shape("ring", 3000, 1024, 512, 16, 4)  # rows an expert and piece that the warp-specialised kernels take


def _stack(layer: Layer, p: Problem, weights: Weights) -> list[Tensor]:
    """y, dx, dgates, dw of layers on top of each other, all forward before the first backward."""
    x, gate, w1, w2 = (t.detach().requires_grad_() for t in (p.x_TD, p.routing.gate_TK, *weights))
    y, experts = x, TritonExperts()
    for _ in range(LAYERS):
        y = y + layer(y, replace(p.routing, gate_TK=gate), experts, (w1, w2))
    return [y.detach(), *torch.autograd.grad(y, (x, gate, w1, w2), p.dy_TD)]


def stacked_layers(chunks: int) -> tuple[float, bool]:
    """Layers that share the copy engines' memory, in bf16: the largest relative L2 distance of anything from one
    process with the same kernels, and whether repeats, in other memory each, gave the same bits."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    p = make_problem(RING, 0.6, rank)
    shape = ExchangeShape(RING.T, RING.D, RING.K, torch.bfloat16, "cuda")
    layer = copy_engine.build(RING.E, dist.group.WORLD, shape, chunks)
    found = []
    for repeat in range(4):
        kept = [torch.full((repeat * 1000 + 7, RING.D), float("nan"), device="cuda") for _ in range(3)]
        found.append(_stack(layer, p, p.block(rank, ranks)))
        del kept
    want = own_share(_stack(LocalDispatch(), p, p.weights), rank, ranks)
    same = all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True))
    return distance(found[0], want), same
