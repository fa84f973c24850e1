"""Every rank sees every token: all-gather, experts where they are, and a reduce-scatter of their sums.

Nothing depends on the routing, so the host never waits. It moves ep - 1 rows a token each way, where `collective` moves
one for each other rank that holds one of a token's experts: about the same once top_k is well above ep.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moetrain.comm.collectives import Moving
from moetrain.comm.compat import all_gather_single, reduce_scatter_single
from moetrain.moe.dispatch.base import Arrived, ExchangeShape, Slots, Weights
from moetrain.moe.dispatch.chunks import Chunks
from moetrain.moe.dispatch.exchange import exchange
from moetrain.moe.dispatch.rows import labels, slots_of
from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.types import Routing


class AllGatherDispatch:
    """n_experts: routed experts over the whole group, a multiple of its size; expert e is on rank e // (E / ep).

    tokens: the most that any rank has; ranks with fewer send empty rows. chunks: stretches of each rank's tokens that
    travel and are computed one after the other.
    """

    CHUNKS = (1, 2, 4)  # what a measurement chooses from

    def __init__(self, n_experts: int, group: dist.ProcessGroup, tokens: int, chunks: Chunks) -> None:
        self.group, self.tokens, self.chunks = group, tokens, chunks
        self.first_expert = group.rank() * (n_experts // group.size())

    def __call__(self, x_TD: Tensor, routing: Routing, experts: ExpertBackend, weights: Weights) -> Tensor:
        assert x_TD.shape[0] <= self.tokens, f"{x_TD.shape[0]} tokens, but made for {self.tokens}"

        def run(chunks: int, x_TD: Tensor, routing: Routing, weights: Weights) -> Tensor:
            most = self.tokens if routing.most is None else routing.most
            trip = _Trip(self.group, x_TD.shape[0], most, chunks)
            return exchange(x_TD, routing, trip, experts, weights, self.first_expert)

        return run(self.chunks.of(run, x_TD, routing, weights), x_TD, routing, weights)


class _Trip:
    first_stays = ahead = False

    def __init__(self, group: dist.ProcessGroup, tokens: int, padded: int, pieces: int) -> None:
        self.group, self.tokens, self.missing, self.pieces = group, tokens, padded - tokens, pieces

    def start(self, row_TD: Tensor, slots: Slots | None = None) -> _Leg:
        rows = F.pad(row_TD, (0, 0, 0, self.missing)) if self.missing else row_TD
        label_TL = None if slots is None else labels(slots)
        if label_TL is not None and self.missing:
            label_TL = F.pad(label_TL, (0, 0, 0, self.missing), value=-1)
        return _Leg(self, rows.contiguous(), label_TL)


class _Leg:
    """All pieces are started before the first is waited for."""

    def __init__(self, trip: _Trip, row_TD: Tensor, label_TL: Tensor | None) -> None:
        self.trip = trip
        parts = [None] * trip.pieces if label_TL is None else list(label_TL.tensor_split(trip.pieces))
        self.coming = [
            (None if label is None else self._gather(label), self._gather(rows))
            for label, rows in zip(parts, row_TD.tensor_split(trip.pieces))
        ]
        self.going: list[list[Moving]] = []

    def _gather(self, x: Tensor) -> Moving:
        rows = x.new_empty((x.shape[0] * self.trip.group.size(), *x.shape[1:]))
        return Moving(rows, all_gather_single(rows, x, group=self.trip.group, async_op=True), x)

    def _scatter(self, x: Tensor) -> Moving:
        rows = x.new_empty((x.shape[0] // self.trip.group.size(), *x.shape[1:]))
        source = x.contiguous()
        return Moving(rows, reduce_scatter_single(rows, source, group=self.trip.group, async_op=True), source)

    def arrive(self, piece: int) -> Arrived:
        label, rows = self.coming[piece]
        return rows.wait(), None if label is None else slots_of(label.wait()), None

    def room(self, piece: int) -> None:
        return None

    def rest(self) -> None:
        return None

    def give(self, piece: int, row_MD: Tensor, gate_MK: Tensor | None = None) -> None:
        self.coming[piece] = (None, Moving(row_MD[:0]))
        self.going.append([self._scatter(t) for t in (row_MD, gate_MK) if t is not None])

    def collect(self) -> tuple[Tensor, Tensor | None]:
        sums = [torch.cat([moving.wait() for moving in column]) for column in zip(*self.going)]
        if sums[0].shape[0] > self.trip.tokens:  # a view would lose FSDP's hook to an operation in place
            sums = [total[: self.trip.tokens].clone() for total in sums]
        return sums[0], sums[1] if len(sums) > 1 else None


def build(
    n_experts: int, group: dist.ProcessGroup | None, shape: ExchangeShape, chunks: str | int = "auto"
) -> AllGatherDispatch:
    """Raises ValueError without a process group, or for a chunk count that is not `auto` or at least 1."""
    if group is None:
        raise ValueError("dispatch=allgather needs torch.distributed; nearest legal value: dispatch=local")
    choice = Chunks("allgather", chunks, AllGatherDispatch.CHUNKS, group)
    return AllGatherDispatch(n_experts, group, max(shape.tokens, 1), choice)
