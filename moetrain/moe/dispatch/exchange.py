"""The exchange: tokens out, experts, weighted sums home; forward and backward side by side.

Both directions run the same schedule over the same trip, because the gradient of a sum is sent where its parts came
from: rows go out (tokens; gradients of the output), experts work piece by piece while other pieces travel, and what
they made goes home (weighted sums; gradients of tokens and gates). Beside the last rows' way home the experts finish
the rows that never left and, in the backward pass, make the weight gradients of all pieces. Shared experts are done
there too, and their gradients beside the first rows' way out. Communication is the transport's (`base.Trip`),
computation the backend's (`experts/base.Pieces`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.comm.compat import graph_is_kept
from moetrain.moe.beside import Beside, Graph, gradients
from moetrain.moe.dispatch.base import Trip, Weights
from moetrain.moe.dispatch.schedule import in_turn
from moetrain.moe.experts.base import ExpertBackend, Pieces
from moetrain.moe.experts.pieces import divide
from moetrain.moe.kept import Kept, kept_graph
from moetrain.moe.types import Routing


def exchange(
    x_TD: Tensor, routing: Routing, trip: Trip, experts: ExpertBackend, weights: Weights, first_expert: int
) -> Tensor:
    """y_TD = sum over chosen experts of gate * expert(x), with the rows moved by `trip`. Collective over its ranks.

    first_expert: the global number of the first expert that `experts` reaches.
    """
    job = _Job(trip, experts, first_expert, routing.kept, routing.beside, torch.is_grad_enabled())
    more = routing.beside.parameters if routing.beside else []
    return _Exchange.apply(x_TD, routing.gate_TK, routing.expert_TK, *weights, job, *more)


@dataclass
class _Job:
    """What the passes of one exchange share.

    work: what the experts, and `beside`, keep from the forward to the backward pass. answer: the output's gradient and
    the inputs', while they may be asked for again: pipeline schedules that split backward passes ask for those of
    inputs first, then for those of weights, and autograd does not say which it wants. The second time nothing is
    exchanged.
    """

    trip: Trip
    experts: ExpertBackend
    first_expert: int
    kept: Kept | None
    beside: Beside | None
    training: bool
    work: tuple[Pieces, Graph | None] | None = None
    answer: tuple[Tensor, tuple[Tensor | None, ...]] | None = None

    @property
    def with_graphs(self) -> bool:
        """Not in evaluation, nor in a first pass whose activations will be recomputed."""
        return self.training and (self.kept is None or self.kept.work is not None)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, gate_TK: Tensor, expert_TK: Tensor, w_gate_up: Tensor, w_down: Tensor, job: _Job,
        *more: Tensor,
    ) -> Tensor:  # fmt: skip
        wanted = ctx.needs_input_grad
        grads = (True, wanted[1], wanted[3], wanted[4])  # the way home is dx's, which gates' gradients share
        work = divide(job.experts, (w_gate_up, w_down), grads if job.with_graphs and any(wanted) else None)
        wide = torch.promote_types(gate_TK.dtype, torch.float32)
        leg = job.trip.start(x_TD, (expert_TK, gate_TK.to(wide)))

        def start(piece: int) -> None:
            x_MD, slots, land = leg.arrive(piece)
            assert slots is not None
            with kept_graph() if job.kept else nullcontext():
                work.start(x_MD, *slots, job.first_expert, land)

        def finish(piece: int) -> None:
            more = leg.rest() if piece == 0 else None
            leg.give(piece, work.finish(piece, leg.room(piece), more))

        beside_TD, graph = None, None

        def last(stay: Callable[[], None]) -> None:
            nonlocal beside_TD, graph
            if job.beside is not None:
                with kept_graph() if job.kept else nullcontext():
                    beside_TD, graph = job.beside.run(x_TD, wanted[0], job.with_graphs)
            stay()

        in_turn(job.trip, work, x_TD.device, start, finish, last)
        y_TD, _ = leg.collect()
        if beside_TD is not None:
            y_TD = y_TD + beside_TD
        ctx.job, ctx.gate_dtype = job, gate_TK.dtype
        ctx.save_for_backward(gate_TK)  # asked for, it has a recomputed pass run
        if job.kept is not None:
            job.kept.work = [(work, graph)] if job.with_graphs else []
        elif job.training:
            job.work = work, graph
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        if job.answer is not None:
            (before_TD, answer), job.answer = job.answer, job.answer if graph_is_kept() else None
            _same_gradient(grads[0], before_TD)
            return answer
        work, graph = _take_work(job, ctx)
        leg = job.trip.start(grads[0].contiguous())
        beside = gradients(graph, grads[0]) if graph else []

        def finish(piece: int) -> None:
            more = leg.rest() if piece == 0 else None
            dx_MD, dgate_MK = work.finish_gradients(piece, leg.room(piece), more)
            assert dx_MD is not None
            leg.give(piece, dx_MD, dgate_MK)

        def start(piece: int) -> None:
            # Weight gradients hide the last rows' way home, so all else may hide the first ones' way here.
            far = job.trip.ahead or (piece == 0 and job.trip.first_stays and job.trip.pieces > 1)
            dy_MD, _, land = leg.arrive(piece)
            if land is not None:
                land()
            work.start_gradients(piece, dy_MD, far)

        dw: list[Tensor | None] = []
        in_turn(job.trip, work, grads[0].device, start, finish, lambda stay: dw.extend(work.weight_gradients(stay)))
        dx_TD, dgate_TK = leg.collect()
        if dgate_TK is not None:
            dgate_TK = dgate_TK.to(ctx.gate_dtype)
        if graph and ctx.needs_input_grad[0]:
            dx_TD = dx_TD + beside.pop(0)
        answer = (dx_TD, dgate_TK, None, *dw, None, *beside)
        job.answer = (grads[0], answer) if graph_is_kept() else None
        return answer


def _same_gradient(dy_TD: Tensor, before_TD: Tensor) -> None:
    """Raises RuntimeError, on a GPU by a device-side assertion that nothing waits for, if a pass is asked for another
    gradient than before, which it cannot give any more. A recomputed dy may differ by rounding; NaN is others' concern.
    """
    other = (dy_TD - before_TD).norm() > 0.01 * before_TD.norm()
    torch._assert_async(~other, "a MoE layer's backward pass is run twice for different gradients of its output")


def _take_work(job: _Job, ctx: Any) -> tuple[Pieces, Graph | None]:
    if job.kept is None:
        work, job.work = job.work, None
    else:
        assert ctx.saved_tensors  # recomputes unless that has happened
        (work,), job.kept.work = job.kept.work or [None], None
    assert work is not None
    return work
