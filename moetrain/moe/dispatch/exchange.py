"""The exchange: tokens out, experts, weighted sums home; forward and backward side by side.

Both directions run the same schedule over the same trip, because the gradient of a sum is sent where its parts came
from: rows go out (tokens; gradients of the output), experts work piece by piece while other pieces travel, and what
they made goes home (weighted sums; gradients of tokens and gates). Weight gradients are made with their piece, so they
too are work beside which rows travel. Communication is the transport's: see `base.Trip`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.comm.compat import graph_is_kept
from moetrain.moe.balance.base import kept_graph
from moetrain.moe.dispatch.base import Trip, Weights
from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.kept import Kept
from moetrain.moe.types import Routing


def exchange(
    x_TD: Tensor,
    routing: Routing,
    trip: Trip,
    experts: ExpertBackend,
    weights: Weights,
    first_expert: int,
    n_experts: int | None = None,
) -> Tensor:
    """y_TD = sum over chosen experts of gate * expert(x), with the rows moved by `trip`. Collective over its ranks.

    first_expert: the global number of the first expert that `experts` reaches; n_experts: how many it reaches, this
    rank's if not said.
    """
    reached = weights[1].shape[0] if n_experts is None else n_experts
    job = _Job(trip, experts, first_expert, reached, routing.kept, torch.is_grad_enabled())
    return _Exchange.apply(x_TD, routing.gate_TK, routing.expert_TK, *weights, job)


@dataclass
class _Job:
    """What the passes of one exchange share.

    calls: the experts' graphs, from the forward to the backward pass. answer: the gradients, while they may be asked
    for again: pipeline schedules that split backward passes ask for those of inputs first, then for those of weights,
    and autograd does not say which it wants. Ranks must not exchange anything at the second asking.
    """

    trip: Trip
    experts: ExpertBackend
    first_expert: int
    n_experts: int
    kept: Kept | None
    training: bool
    calls: list[_Call] = field(default_factory=list)
    answer: tuple[Tensor | None, ...] | None = None

    @property
    def with_graphs(self) -> bool:
        """Not in evaluation, nor in a first pass whose activations will be recomputed."""
        return self.training and (self.kept is None or self.kept.calls is not None)

    def local_slots(self, label_ML: Tensor) -> tuple[Tensor, Tensor]:
        """Labels -> slots_MK (numbers among this rank's experts, -1 for others') and gates_MK."""
        expert_MK, gate_MK = label_ML.chunk(2, dim=1)
        slot_MK = expert_MK.long() - self.first_expert
        return slot_MK.masked_fill((slot_MK < 0) | (slot_MK >= self.n_experts), -1), gate_MK.contiguous()


class _Call:
    """One call of the experts, with its own graph if `grads` says which of x, gates, and weights want a gradient."""

    def __init__(
        self, job: _Job, x_MD: Tensor, label_ML: Tensor, weights: tuple[Tensor, ...], grads: tuple[bool, ...]
    ) -> None:
        slot_MK, gate_MK = job.local_slots(label_ML)
        if not job.with_graphs:
            self.y_MD: Tensor | None = job.experts(x_MD, slot_MK, gate_MK, *weights)
            return
        inputs = (x_MD, gate_MK, *weights)
        self.leaves = [t.detach().requires_grad_(wanted) for t, wanted in zip(inputs, grads)]
        with torch.enable_grad(), kept_graph() if job.kept else nullcontext():
            y_MD = job.experts(self.leaves[0], slot_MK, *self.leaves[1:])
        self.edge = torch.autograd.graph.get_gradient_edge(y_MD)
        self.y_MD = y_MD.detach()

    def take(self) -> Tensor:
        """The result, once: only the graph stays."""
        y_MD, self.y_MD = self.y_MD, None
        assert y_MD is not None
        return y_MD

    def gradients(self, dy_MD: Tensor) -> list[Tensor | None]:
        """Of x, gates, and both weights, None where none is wanted. The graph is used up."""
        wanted = [leaf for leaf in self.leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad([self.edge], wanted, [dy_MD]))
        return [next(found) if leaf.requires_grad else None for leaf in self.leaves]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, gate_TK: Tensor, expert_TK: Tensor, w_gate_up: Tensor, w_down: Tensor, job: _Job
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        grads = (wanted[0], wanted[1], wanted[3], wanted[4])
        calls = []
        wide = torch.promote_types(gate_TK.dtype, torch.float32)  # which counts experts exactly
        leg = job.trip.start(x_TD, torch.cat([expert_TK.to(wide), gate_TK.to(wide)], dim=1))
        for piece in range(job.trip.pieces):
            x_MD, label_ML = leg.arrive(piece)
            assert label_ML is not None
            call = _Call(job, x_MD, label_ML, (w_gate_up, w_down), grads)
            leg.give(piece, call.take())
            calls.append(call)
        y_TD, _ = leg.collect()
        ctx.job, ctx.gate_dtype = job, gate_TK.dtype
        ctx.save_for_backward(gate_TK)  # asked for, it has a recomputed pass run
        if job.kept is not None:
            job.kept.calls = calls if job.with_graphs else []
        elif job.training:
            job.calls = calls
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        if job.answer is not None:
            answer, job.answer = job.answer, job.answer if graph_is_kept() else None
            return answer
        calls = _take_calls(job, ctx)
        dw: list[Tensor | None] = [None, None]
        leg = job.trip.start(grads[0].contiguous())
        for piece in range(job.trip.pieces):
            dy_MD, _ = leg.arrive(piece)
            dx_MD, dgate_MK, *dw_piece = calls[piece].gradients(dy_MD)
            calls[piece] = None  # type: ignore[call-overload]  # frees its graph
            assert dx_MD is not None, "the input of a MoE layer wants a gradient"
            leg.give(piece, dx_MD, dgate_MK)
            dw = [_add(total, part) for total, part in zip(dw, dw_piece)]
        dx_TD, dgate_TK = leg.collect()
        if dgate_TK is not None:
            dgate_TK = dgate_TK.to(ctx.gate_dtype)
        answer = (dx_TD, dgate_TK, None, *dw, None)
        job.answer = answer if graph_is_kept() else None
        return answer


def _take_calls(job: _Job, ctx: Any) -> list[_Call]:
    if job.kept is None:
        calls, job.calls = job.calls, []
        return calls
    assert ctx.saved_tensors  # recomputes unless that has happened
    calls, job.kept.calls = job.kept.calls or [], None
    return calls


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """In place where the total is ours alone: weight gradients are large."""
    if total is None or part is None:
        return part if total is None else total
    return total.add_(part) if total.is_contiguous() else total + part
