"""Tokens travel by uneven all-to-all (NCCL or gloo): works on every machine and between nodes.

A token is sent once to each rank that holds at least one of its experts, with the numbers and gates of all its experts.
There the weighted sum over that rank's experts is formed, and one row comes back. That is fewer bytes than one row per
expert both ways. One host synchronisation per layer and step: the collective needs its row counts on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.collectives import Moving, start_all_to_all
from moetrain.moe.dispatch.base import ExchangeShape, Weights
from moetrain.moe.dispatch.chunks import Chunks
from moetrain.moe.dispatch.exchange import exchange
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
        if routing.bounded and self.rows is not None and tokens:
            send = receive = [self.rows] * self.ep
            token_N = _padded(wanted_RT, self.rows)
        else:
            send, receive = self._row_counts(wanted_RT.sum(dim=1), routing)
            token_N = positions(wanted_RT.flatten(), sum(send)) % max(tokens, 1)  # of each (rank, token) wanted
        parts = cut(token_N, send, receive, self.rank, chunks)
        return AllToAllTrip(self.group, tokens, parts, padded=routing.bounded, fp8=self.fp8)

    def _row_counts(self, send_R: Tensor, routing: Routing) -> tuple[list[int], list[int]]:
        """Exchanged once: a recomputed pass has the same routing."""
        if routing.kept is None:
            return self._exchange_counts(send_R)
        if routing.kept.rows is None:
            routing.kept.rows = self._exchange_counts(send_R)
        return routing.kept.rows

    def _exchange_counts(self, send_R: Tensor) -> tuple[list[int], list[int]]:
        receive_R = torch.empty_like(send_R)
        dist.all_to_all_single(receive_R, send_R, group=self.group)
        send, receive = torch.stack([send_R, receive_R]).tolist()  # the one host synchronisation
        return send, receive


@dataclass(frozen=True)
class Part:
    """Rows that travel together. token_N: the tokens of this rank's rows, rank by rank, less T where a row is empty;
    counts: rows to and from each rank, or None where they stay."""

    token_N: Tensor
    counts: tuple[list[int], list[int]] | None


def wanted_by_rank(expert_TK: Tensor, local_experts: int, ranks: int) -> Tensor:
    """bool [R, T]: whether a rank holds any expert of a token."""
    owner_TK = torch.where(expert_TK >= 0, expert_TK // local_experts, -1)
    rank_R11 = torch.arange(ranks, device=expert_TK.device)[:, None, None]
    return (owner_TK.T[None] == rank_R11).any(dim=1)


def cut(token_N: Tensor, send: list[int], receive: list[int], rank: int, chunks: int) -> list[Part]:
    """The parts in the order in which the experts take them; the same number and kinds on every rank."""
    if chunks == 1:
        return [Part(token_N, (send, receive))]
    of_rank = token_N.split(send)
    others = max(chunks - 2, 1)
    away = []
    for i in range(others):
        out, back = [_share(n, i, others) for n in send], [_share(n, i, others) for n in receive]
        out[rank] = back[rank] = range(0)
        tokens = torch.cat([t[r.start : r.stop] for t, r in zip(of_rank, out)])
        away.append(Part(tokens, ([len(r) for r in out], [len(r) for r in back])))
    if chunks == 2:
        return [Part(of_rank[rank], None), *away]
    first, second = of_rank[rank].tensor_split(2)
    return [Part(first, None), *away, Part(second, None)]


def rows_of_parts(receive: list[int], rank: int, chunks: int) -> list[int]:
    """How many rows arrive with each part of `cut`."""
    if chunks == 1:
        return [sum(receive)]
    others, own = max(chunks - 2, 1), receive[rank]
    coming = [n for peer, n in enumerate(receive) if peer != rank]
    away = [sum(len(_share(n, i, others)) for n in coming) for i in range(others)]
    return [own, *away] if chunks == 2 else [own - own // 2, *away, own // 2]


def _share(n: int, i: int, parts: int) -> range:
    return range(n * i // parts, n * (i + 1) // parts)


def positions(flag_N: Tensor, total: int) -> Tensor:
    """Indices of the `total` true entries, in order: torch.nonzero without its host synchronisation."""
    rank_N = torch.where(flag_N, flag_N.cumsum(0) - 1, total)  # the entry past the end takes what is false
    index_N = torch.arange(flag_N.numel(), device=flag_N.device)
    return torch.empty(total + 1, dtype=torch.int64, device=flag_N.device).scatter_(0, rank_N, index_N)[:total]


def _padded(wanted_RT: Tensor, rows: int) -> Tensor:
    """[R * rows]: for each rank the tokens it is sent, then empty rows: t - T for some token t, all different ones."""
    ranks, tokens = wanted_RT.shape
    place_RT = wanted_RT.cumsum(1) - 1
    first_R1 = torch.arange(ranks, device=wanted_RT.device)[:, None] * rows
    place_RT = torch.where(wanted_RT & (place_RT < rows), first_R1 + place_RT, ranks * rows)
    token_N = torch.arange(ranks * rows + 1, device=wanted_RT.device) % tokens - tokens
    token_RT = torch.arange(tokens, device=wanted_RT.device).expand(ranks, tokens)
    return token_N.scatter_(0, place_RT.flatten(), token_RT.flatten())[:-1]


class AllToAllTrip:
    """parts: `cut`'s. padded: some rows may be empty. fp8: on the way out hidden states of others are 8-bit floats."""

    def __init__(
        self, group: dist.ProcessGroup, tokens: int, parts: list[Part], padded: bool = False, fp8: bool = False
    ) -> None:
        self.group, self.tokens, self.parts, self.padded, self.fp8 = group, tokens, parts, padded, fp8
        self.pieces, self.first_stays = len(parts), parts[0].counts is None

    def start(self, row_TD: Tensor, label_TL: Tensor | None = None) -> _Leg:
        return _Leg(self, row_TD, label_TL)


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
        self.token = {id(part): part.token_N % trip.tokens if trip.padded else part.token_N for part in trip.parts}
        self.exact_TD, sent_TD, sent_TL = row_TD, row_TD, label_TL
        if self.fp8:
            assert label_TL is not None
            sent_TD, scale_T1 = encode(row_TD)
            sent_TL = torch.cat([label_TL, scale_T1.to(label_TL.dtype)], dim=1)
        self.coming = {id(part): [self._move(t, part) for t in self._rows(part, sent_TD, sent_TL)] for part in moved}
        self.coming |= {id(part): [Moving(t) for t in self._rows(part, row_TD, label_TL)] for part in stays}
        self.going: dict[int, list[Moving]] = {}

    def _rows(self, part: Part, row_TD: Tensor, label_TL: Tensor | None) -> list[Tensor]:
        token_N = self.token[id(part)]
        if label_TL is None:
            return [row_TD[token_N]]
        label_NL = label_TL[token_N]
        if self.trip.padded:
            label_NL[:, : self.labels].masked_fill_((part.token_N < 0)[:, None], -1)
        return [label_NL, row_TD[token_N]]

    def _move(self, x: Tensor, part: Part, home: bool = False) -> Moving:
        if part.counts is None:
            return Moving(x)
        send, receive = reversed(part.counts) if home else part.counts
        return start_all_to_all(x, send, receive, self.trip.group)

    def arrive(self, piece: int) -> tuple[Tensor, Tensor | None]:
        part = self.trip.parts[piece]
        *label, rows = [moving.wait() for moving in self.coming.pop(id(part))]
        if self.fp8 and part.counts is not None:
            return self._decoded(part, rows, label[0]), label[0][:, :-1]
        return rows, label[0] if label else None

    def _decoded(self, part: Part, byte_ND: Tensor, label_NL: Tensor) -> Tensor:
        """What came, and of this rank's own rows what they were: no result depends on the number of pieces."""
        row_ND = decode(byte_ND, label_NL[:, -1:], self.exact_TD.dtype)
        assert part.counts is not None
        (send, receive), rank = part.counts, self.trip.group.rank()
        sent, came = sum(send[:rank]), sum(receive[:rank])
        own_N = self.token[id(part)][sent : sent + send[rank]]
        torch.index_select(self.exact_TD, 0, own_N, out=row_ND[came : came + send[rank]])
        return row_ND

    def room(self, piece: int) -> None:
        return None

    def rest(self) -> None:
        return None

    def give(self, piece: int, row_MD: Tensor, gate_MK: Tensor | None = None) -> None:
        part = self.trip.parts[piece]
        given = [row_MD] if gate_MK is None else [row_MD, gate_MK]
        self.going[piece] = [self._move(t, part, home=True) for t in given]

    def collect(self) -> tuple[Tensor, Tensor | None]:
        first = self.going[0]
        sums = [m.rows.new_zeros(self.trip.tokens, m.rows.shape[1]) for m in first]
        for piece, part in enumerate(self.trip.parts):
            for total, rows in zip(sums, self.going[piece]):
                total.index_add_(0, self.token[id(part)], rows.wait())
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
