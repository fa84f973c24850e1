"""One MoE layer's inputs on every rank of one host, for measuring an exchange: tokens differ, weights do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.dispatch.base import Weights
from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.types import Routing
from moetrain.testing.fake import fake_routing

Layer = Callable[[Tensor, Routing, ExpertBackend, Weights], Tensor]


@dataclass(frozen=True)
class Shape:
    """tokens per rank; d_model; d_expert; experts; top_k."""

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int


SHAPES = [
    Shape("stand-in", 8192, 4096, 1536, 64, 8),
    Shape("qwen3", 8192, 2048, 768, 128, 8),
    Shape("mixtral", 8192, 4096, 14336, 8, 2),
]


@dataclass
class Problem:
    """One rank's tokens and all experts' weights, the same on every rank."""

    x_TD: Tensor
    dy_TD: Tensor
    routing: Routing
    weights: Weights

    def block(self, rank: int, ranks: int) -> Weights:
        """A rank's experts."""
        own = slice(rank * len(self.weights[0]) // ranks, (rank + 1) * len(self.weights[0]) // ranks)
        return self.weights[0][own], self.weights[1][own]


def make_problem(shape: Shape, zipf: float, rank: int) -> Problem:
    """Popularity of experts rank^-zipf, shuffled alike on all ranks."""
    common = torch.Generator("cuda").manual_seed(0)
    mine = torch.Generator("cuda").manual_seed(1 + rank)

    def normal(generator: torch.Generator, *size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16, generator=generator).mul_(scale)

    w_gate_up = normal(common, shape.E, 2, shape.F, shape.D, scale=shape.D**-0.5)
    w_down = normal(common, shape.E, shape.D, shape.F, scale=shape.F**-0.5)
    popularity_E = torch.arange(1, shape.E + 1, device="cuda").double() ** -zipf
    popularity_E = popularity_E[torch.randperm(shape.E, device="cuda", generator=common)]
    uniform_TE = torch.rand(shape.T, shape.E, device="cuda", dtype=torch.float64, generator=mine)
    expert_TK = (popularity_E.log() - uniform_TE.log().neg().log()).topk(shape.K).indices
    gate_TK = torch.rand(shape.T, shape.K, device="cuda", generator=mine).softmax(-1)
    routing = fake_routing(expert_TK, gate_TK)
    x, dy = normal(mine, shape.T, shape.D), normal(mine, shape.T, shape.D)
    return Problem(x, dy, routing, (w_gate_up, w_down))


def step(layer: Layer, p: Problem, weights: Weights, backend: ExpertBackend, backward: bool) -> list[Tensor]:
    """y, and with backward dx, dgates, dw_gate_up, dw_down."""
    x, gate, w1, w2 = (t.detach().requires_grad_() for t in (p.x_TD, p.routing.gate_TK, *weights))
    y = layer(x, replace(p.routing, gate_TK=gate), backend, (w1, w2))
    return [y.detach(), *(torch.autograd.grad(y, (x, gate, w1, w2), p.dy_TD) if backward else ())]


def own_share(found: list[Tensor], rank: int, ranks: int) -> list[Tensor]:
    """Collective: of `step` with all experts here what an exchange gives this rank. Weight gradients are summed over
    ranks, in place, and cut to its experts."""
    for grad in found[3:]:
        dist.all_reduce(grad)
    own = slice(rank * len(found[3]) // ranks, (rank + 1) * len(found[3]) // ranks)
    return [*found[:3], *(grad[own].clone() for grad in found[3:])]


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """Collective: largest relative L2 distance over tensors and ranks; infinite for NaN."""
    errors = torch.stack([(a.double() - b.double()).norm() / b.double().norm() for a, b in zip(got, want)])
    worst = errors.nan_to_num(float("inf")).max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)
