"""Into how many pieces an exchange is cut: as asked for, or as measured in the first training step on a GPU.

The order in which a weight's gradient is added up depends on it, so a run that is to repeat to the bit
(run.deterministic) must not have it from a clock.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.dispatch.base import Weights
from moetrain.moe.kept import kept_graph
from moetrain.moe.types import Routing

Run = Callable[[int, Tensor, Routing, Weights], Tensor]  # chunks, x_TD, routing, weights -> y_TD
REPEATS, WARMUP = 3, 2
LOPSIDED = 1.25  # load of the fullest rank over the mean


def check_chunks(chunks: str | int) -> None:
    """Raises ValueError for what is neither "auto" nor a number from 1 on."""
    if chunks != "auto" and (isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1):
        raise ValueError(f"dispatch.chunks={chunks!r} is no count of pieces; nearest legal value: auto (or 1)")


class Chunks:
    """A chunk count for all layers. chunks: a number, or "auto": 1 on a CPU, the first of `candidates` where torch is
    told to be deterministic, else the fastest of them.

    The ranks of `groups`, at first one, agree on the count whose slowest rank is fastest. Ranks of two groups, of which
    each has one of every other's, agree all. Raises ValueError for anything else.
    """

    def __init__(self, name: str, chunks: str | int, candidates: Sequence[int], group: dist.ProcessGroup) -> None:
        check_chunks(chunks)
        self.name, self.candidates, self.groups = name, candidates, [group]
        self.count = None if chunks == "auto" else int(chunks)

    def of(self, run: Run, x_TD: Tensor, routing: Routing, weights: Weights) -> int:
        """The count. Its first call in training may measure, which is collective over the group."""
        if self.count is None and not x_TD.is_cuda:
            self.count = 1
        if self.count is None and torch.are_deterministic_algorithms_enabled():
            self.count = self.candidates[0]
        if self.count is None and torch.is_grad_enabled():
            routing = settled(routing, len(weights[0]), self.groups[0])
            seconds = [_measure(run, chunks, x_TD, routing, weights) for chunks in self.candidates]
            self.count = self.agree(seconds, x_TD.device)
        return self.count or 1

    def agree(self, seconds: list[float], device: torch.device) -> int:
        """The candidate whose slowest rank is fastest; rank 0 prints what was found."""
        slowest = torch.tensor(seconds, device=device)
        for group in self.groups:
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
        found = slowest.tolist()
        best = self.candidates[found.index(min(found))]
        if dist.get_rank() == 0:
            table = ", ".join(f"{c}: {1e3 * s:.2f} ms" for c, s in zip(self.candidates, found))
            print(f"dispatch {self.name}: chunks={best} ({table}, forward + backward)", flush=True)
        return best


def settled(routing: Routing, experts: int, group: dist.ProcessGroup) -> Routing:
    """Collective over `group`: a routing to measure with, `experts` being on each rank. A new router sends most tokens
    to few experts, which says nothing of the steps to come: where loads of ranks differ much, each slot in use gets one
    of all experts by chance instead. One that is bounded (capacity.pad) stays what it is.
    """
    expert_TK, ranks = routing.expert_TK, dist.get_world_size(group)
    load = torch.bincount((expert_TK[expert_TK >= 0] // experts).flatten(), minlength=ranks).float()
    dist.all_reduce(load, group=group)
    if routing.bounded or load.max() <= LOPSIDED * load.mean() or expert_TK.shape[1] > experts * ranks:
        return routing
    g = torch.Generator(expert_TK.device).manual_seed(dist.get_rank(group))
    chance_TE = torch.rand(len(expert_TK), experts * ranks, generator=g, device=expert_TK.device)
    even_TK = chance_TE.topk(expert_TK.shape[1], dim=1).indices
    return replace(routing, expert_TK=torch.where(expert_TK < 0, expert_TK, even_TK))


def _measure(run: Run, chunks: int, x_TD: Tensor, routing: Routing, weights: Weights) -> float:
    """Seconds of a forward and backward pass on the device."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    for i in range(-WARMUP, REPEATS):
        if i >= 0:
            events[i].record()
        x, gate, *w = (t.detach().requires_grad_() for t in (x_TD, routing.gate_TK, *weights))
        with kept_graph():  # the layer around it may be one whose activations are recomputed
            y_TD = run(chunks, x, replace(routing, gate_TK=gate, kept=None, beside=None), (w[0], w[1]))
            torch.autograd.grad(y_TD, (x, gate, *w), torch.ones_like(y_TD))
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3
