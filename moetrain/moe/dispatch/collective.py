"""Tokens travel by uneven all-to-all (NCCL or gloo): works on every machine and between nodes.

A token is sent once to each rank that holds at least one of its experts, with the numbers and gates of all its experts.
There the weighted sum over that rank's experts is formed, and one row comes back. That is fewer bytes than one row per
expert both ways. One host synchronisation per layer and step: the collective needs its row counts on the host.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.collectives import Moving, start_all_to_all
from moetrain.comm.reading import Reading
from moetrain.moe.dispatch.base import Arrived, ExchangeShape, Slots, Weights
from moetrain.moe.dispatch.chunks import Chunks
from moetrain.moe.dispatch.exchange import exchange
from moetrain.moe.dispatch.rows import (
    Part,
    cut,
    labels,
    moved,
    padded,
    places,
    rows_of_tokens,
    slots_of,
    tokens_at,
    wanted_by_rank,
)
from moetrain.moe.dispatch.sums import sum_rows
from moetrain.moe.dispatch.wire import check_wire, decode, encode
from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.types import Routing


class CollectiveDispatch:
    """n_experts: routed experts over the whole group, a multiple of its size; expert e is on rank e // (E / ep).

    chunks: calls of the experts per layer. 1: all rows in one all-to-all, then all experts. From 2 on this rank's own
    rows are computed while others' travel: 2 takes its own, then the others'; n >= 3 takes the first half of its own,
    the others' in n - 2 parts, and the other half of its own while the last results go home.
    rows: what goes to each rank when the routing is bounded, filled up with empty rows: then the host need not know.
    fp8: hidden states of other ranks travel as 8-bit floats; nothing else does (wire.py).
    """

    CHUNKS = (1, 2, 3, 4, 6)  # what a measurement chooses from

    def __init__(
        self, n_experts: int, group: dist.ProcessGroup, chunks: Chunks, rows: int | None = None, fp8: bool = False
    ) -> None:
        assert n_experts % group.size() == 0, "validate.py refuses experts that do not divide evenly"
        self.group = group
        self.ep, self.rank = group.size(), group.rank()
        self.local_experts = n_experts // self.ep
        self.chunks, self.rows, self.fp8 = chunks, rows, fp8

    def __call__(self, x_TD: Tensor, routing: Routing, experts: ExpertBackend, weights: Weights) -> Tensor:
        def run(chunks: int, x_TD: Tensor, routing: Routing, weights: Weights) -> Tensor:
            trip = self._trip(routing, chunks)
            return exchange(x_TD, routing, trip, experts, weights, self.rank * self.local_experts)

        return run(self.chunks.of(run, x_TD, routing, weights), x_TD, routing, weights)

    def _trip(self, routing: Routing, chunks: int) -> AllToAllTrip:
        wanted_RT = wanted_by_rank(routing.expert_TK, self.local_experts, self.ep)
        tokens = wanted_RT.shape[1]
        if routing.bounded and self.rows is not None:
            if not tokens:  # nothing to fill rows up with, while the others expect them and exchange no counts
                raise ValueError("dispatch.capacity.pad=true with a rank without tokens; nearest legal value: false")
            send = receive = [self.rows] * self.ep
            place_RT, token_N = padded(wanted_RT, self.rows)
        else:
            known = routing.kept is not None and routing.kept.rows is not None  # a recomputed pass has the same routing
            counts = None if known else self._exchange_counts(wanted_RT.sum(dim=1))
            place_RT = places(wanted_RT)
            token_S = tokens_at(place_RT)
            send, receive = self._counts(counts, routing)
            token_N = token_S[: sum(send)]
        parts, row_TR = cut(token_N, send, receive, self.rank, chunks), rows_of_tokens(place_RT)
        if chunks > 1:
            row_TR = moved(row_TR, cut(torch.arange(sum(send), device=row_TR.device), send, receive, self.rank, chunks))
        return AllToAllTrip(self.group, parts, row_TR, padded=routing.bounded, fp8=self.fp8)

    def _exchange_counts(self, send_R: Tensor) -> Reading:
        receive_R = torch.empty_like(send_R)
        dist.all_to_all_single(receive_R, send_R, group=self.group)
        return Reading(torch.stack([send_R, receive_R]))

    def _counts(self, counts: Reading | None, routing: Routing) -> tuple[list[int], list[int]]:
        if counts is None:
            assert routing.kept is not None
            return routing.kept.rows
        send, receive = counts.tolist()  # the one host synchronisation
        if routing.kept is not None:
            routing.kept.rows = (send, receive)
        return send, receive


class AllToAllTrip:
    """parts: `cut`'s. row_TR: where a token's rows come home to, when all parts lie behind each other; -1 for none.

    padded: some rows may be empty. fp8: on the way out hidden states of others are 8-bit floats.
    """

    ahead = False

    def __init__(
        self, group: dist.ProcessGroup, parts: list[Part], row_TR: Tensor, padded: bool = False, fp8: bool = False
    ) -> None:
        self.group, self.parts, self.row_TR, self.padded, self.fp8 = group, parts, row_TR, padded, fp8
        self.pieces, self.first_stays = len(parts), parts[0].counts is None
        sizes = [len(part.token_N) for part in parts]
        self.stretches = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(parts))]

    def start(self, row_TD: Tensor, slots: Slots | None = None) -> _Leg:
        return _Leg(self, row_TD, None if slots is None else labels(slots))


class _Leg:
    """Everything that travels is started before anything is waited for.

    With fp8 the last label is the row's scale: labels keep 32 bits.
    """

    def __init__(self, trip: AllToAllTrip, row_TD: Tensor, label_TL: Tensor | None) -> None:
        self.trip = trip
        self.labels = 0 if label_TL is None else label_TL.shape[1]
        self.fp8 = trip.fp8 and label_TL is not None
        moved = [part for part in trip.parts if part.counts is not None]
        stays = [part for part in trip.parts if part.counts is None]
        tokens = len(row_TD)
        self.token = {id(part): part.token_N % tokens if trip.padded else part.token_N for part in trip.parts}
        self.exact_TD, sent_TD, sent_TL = row_TD, row_TD, label_TL
        if self.fp8:
            assert label_TL is not None
            sent_TD, scale_T1 = encode(row_TD)
            sent_TL = torch.cat([label_TL, scale_T1.to(label_TL.dtype)], dim=1)
        self.coming = {id(part): [self._move(t, part) for t in self._rows(part, sent_TD, sent_TL)] for part in moved}
        self.coming |= {id(part): [Moving(t) for t in self._rows(part, row_TD, label_TL)] for part in stays}
        self.home: list[Tensor] = []  # rows that come home, part by part, and, backward, their gates' gradients
        self.going: list[Moving] = []

    def _rows(self, part: Part, row_TD: Tensor, label_TL: Tensor | None) -> list[Tensor]:
        token_N = self.token[id(part)]
        if label_TL is None:
            return [row_TD[token_N]]
        label_NL = label_TL[token_N]
        if self.trip.padded:
            label_NL[:, : self.labels].masked_fill_((part.token_N < 0)[:, None], -1)
        return [label_NL, row_TD[token_N]]

    def _move(self, x: Tensor, part: Part) -> Moving:
        if part.counts is None:
            return Moving(x)
        return start_all_to_all(x, *part.counts, self.trip.group)

    def arrive(self, piece: int) -> Arrived:
        part = self.trip.parts[piece]
        *label, rows = [moving.wait() for moving in self.coming.pop(id(part))]
        if self.fp8 and part.counts is not None:
            return self._decoded(part, rows, label[0]), slots_of(label[0][:, :-1]), None
        return rows, slots_of(label[0]) if label else None, None

    def _decoded(self, part: Part, byte_ND: Tensor, label_NL: Tensor) -> Tensor:
        """What came, and of this rank's own rows what they were: no result depends on the number of pieces."""
        row_ND = decode(byte_ND, label_NL[:, -1:], self.exact_TD.dtype)
        assert part.counts is not None
        (send, receive), rank = part.counts, self.trip.group.rank()
        sent, came = sum(send[:rank]), sum(receive[:rank])
        own_N = self.token[id(part)][sent : sent + send[rank]]
        torch.index_select(self.exact_TD, 0, own_N, out=row_ND[came : came + send[rank]])
        return row_ND

    def room(self, piece: int) -> Tensor | None:
        stays = self.trip.parts[piece].counts is None
        return self._home(0, self.exact_TD)[self.trip.stretches[piece]] if stays else None

    def _home(self, kind: int, like: Tensor) -> Tensor:
        """kind: 0 rows, 1 gates."""
        if len(self.home) == kind:
            self.home.append(like.new_empty(self.trip.stretches[-1].stop, like.shape[1]))
        assert self.home[kind].dtype == like.dtype
        return self.home[kind]

    def rest(self) -> None:
        return None

    def give(self, piece: int, row_MD: Tensor, gate_MK: Tensor | None = None) -> None:
        part, stretch = self.trip.parts[piece], self.trip.stretches[piece]
        for kind, given in enumerate([row_MD] if gate_MK is None else [row_MD, gate_MK]):
            home = self._home(kind, given)[stretch]
            if part.counts is not None:
                received, sent = part.counts
                self.going.append(start_all_to_all(given, sent, received, self.trip.group, home))
            elif given.data_ptr() != home.data_ptr():
                home.copy_(given)

    def collect(self) -> tuple[Tensor, Tensor | None]:
        for moving in self.going:
            moving.wait()
        sums = [sum_rows(home, self.trip.row_TR) for home in self.home]
        return sums[0], sums[1] if len(sums) > 1 else None


def build(
    n_experts: int,
    group: dist.ProcessGroup | None,
    shape: ExchangeShape,
    chunks: str | int = "auto",
    wire: str = "full",
) -> CollectiveDispatch:
    """Raises ValueError without a process group, for a chunk count that is not `auto` or at least 1, or `wire`."""
    if group is None:
        raise ValueError("dispatch=collective needs torch.distributed; nearest legal value: dispatch=local")
    check_wire("collective", wire, shape)
    choice = Chunks("collective", chunks, CollectiveDispatch.CHUNKS, group)
    return CollectiveDispatch(n_experts, group, choice, shape.rows, wire == "fp8")
