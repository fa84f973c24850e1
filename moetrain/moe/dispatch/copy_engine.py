"""Peers copy each other's tokens by their copy engines while experts compute: no multiprocessors, no host waiting.

Every rank's rows are copied whole by every peer (like dispatch=allgather; which rows an expert wants stays on the
device), and the sums over this rank's experts are copied home the same way. Measured stand-ins for this and for NCCL
are in docs/dispatch.md.

One leg, with its number n. Buffers serve all layers and passes in turn; every leg of a model uses them alike.
    beside write rows into OUT (backward: here, and first); post "out of r = n" to every peer;
           for each peer s, nearest first: wait for "out of s >= n", copy its OUT here, slots in front of rows
    here   the experts' first half of the own rows, then of each part of the peers' rows: the sort when its slots have
           arrived, the rest when its rows have;
           the second half of one part after the other: write the sums into HOME of their owners, post (backward:
           beside) "home from r, part p = n" to them
    beside for each part p, while the experts work on the next: wait for "home from s, part p >= n", copy it here
    here   the second half of the own rows while the last part travels, backward all weight gradients too; add up
OUT is free for leg n + 1: every peer posted its last "home" of leg n after copying it, and this rank has waited for
those. HOME of s is free when a piece of leg n + 1 with rows of s is done: s posted "out" after it had added up leg n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.peer import LANES, PeerMemory, SymmetricMemory, captured, unreachable
from moetrain.moe.dispatch.base import Arrived, ExchangeShape, Slots, Weights
from moetrain.moe.dispatch.chunks import Chunks
from moetrain.moe.dispatch.exchange import exchange
from moetrain.moe.dispatch.segments import Segment, cuts, segments
from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.types import Routing

MOST_PARTS = 32  # that have a flag each
ROWS, NUMBERS = range(LANES)  # gates' gradients beside rows: a short copy takes as long again between copies
ALIGN = 512


@dataclass(frozen=True)
class Region:
    """Where one kind of tensor lies in every rank's memory. offset in bytes behind the flags."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def regions(shape: ExchangeShape, ranks: int) -> tuple[dict[str, Region], int]:
    """The buffers by name, and the bytes of all: out_* for this rank's tokens, home_* for the sums of each peer's, the
    nearest peer first, as they are computed."""
    wide = torch.promote_types(shape.dtype, torch.float32)
    wanted = {
        "out_rows": ((shape.tokens, shape.d_model), shape.dtype),
        "out_experts": ((shape.tokens, shape.top_k), torch.int32),
        "out_gates": ((shape.tokens, shape.top_k), wide),
        "home_rows": ((ranks - 1, shape.tokens, shape.d_model), shape.dtype),
        "home_gates": ((ranks - 1, shape.tokens, shape.top_k), wide),
    }
    placed, offset = {}, 0
    for name, (size, dtype) in wanted.items():
        placed[name] = Region(offset, size, dtype)
        offset += -(-math.prod(size) * dtype.itemsize // ALIGN) * ALIGN
    return placed, offset


class CopyEngineDispatch:
    """n_experts: routed experts over all ranks of `memory`; expert e is on rank e // (E / ranks).

    chunks: calls of the experts per layer: one for the own rows, the others for equal parts of the peers'.
    """

    CHUNKS = (2, 3, 4)  # what a measurement chooses from

    def __init__(self, n_experts: int, memory: PeerMemory, shape: ExchangeShape, chunks: Chunks) -> None:
        self.memory, self.shape, self.chunks = memory, shape, chunks
        self.first_expert = memory.rank * (n_experts // memory.size)
        placed, _ = regions(shape, memory.size)
        self.buffers = {  # views are made once: they cost the host more than a copy's launch
            (rank, name): memory.view(rank, region.offset, region.shape, region.dtype)
            for rank in range(memory.size)
            for name, region in placed.items()
        }
        self.known: dict[tuple[int, int], list[Segment]] = {}  # by rank and parts, of `shape.tokens` a rank
        self.peers = [(memory.rank + 1 + i) % memory.size for i in range(memory.size - 1)]
        self.leg = 0

    def __call__(self, x_TD: Tensor, routing: Routing, experts: ExpertBackend, weights: Weights) -> Tensor:
        tokens, slots = routing.expert_TK.shape
        assert tokens <= self.shape.tokens, f"{tokens} tokens, but made for {self.shape.tokens}"
        assert slots == self.shape.top_k, f"{slots} experts a token, but made for {self.shape.top_k}"
        assert x_TD.dtype == self.shape.dtype, f"{x_TD.dtype}, but made for {self.shape.dtype}"
        if captured(x_TD):  # a replay would find every flag where this pass left it
            raise ValueError("dispatch=copy_engine in a CUDA graph; nearest legal value: dispatch=allgather")

        def run(chunks: int, x_TD: Tensor, routing: Routing, weights: Weights) -> Tensor:
            most = self.shape.tokens if routing.most is None else routing.most
            trip = _Trip(self, len(x_TD), chunks, most)
            return exchange(x_TD, routing, trip, experts, weights, self.first_expert)

        return run(self.chunks.of(run, x_TD, routing, weights), x_TD, routing, weights)

    def buffer(self, rank: int, name: str) -> Tensor:
        """A region of a rank's memory."""
        return self.buffers[rank, name]

    def segments(self, rank: int, parts: int, most: int) -> list[Segment]:
        """How `rank` cuts its peers' rows, `most` each, into `parts`."""
        if most != self.shape.tokens:  # differs from step to step
            return segments(rank, self.memory.size, most, parts)
        if (rank, parts) not in self.known:
            self.known[rank, parts] = segments(rank, self.memory.size, self.shape.tokens, parts)
        return self.known[rank, parts]

    def out_flag(self, source: int) -> int:
        """Of the flags that `source` posts."""
        return source

    def home_flag(self, source: int, part: int) -> int:
        assert part < MOST_PARTS, "the next source's flag"
        return self.memory.size + source * MOST_PARTS + part


class _Trip:
    """most: rows that every rank is taken to have, with empty ones behind its own."""

    def __init__(self, dispatch: CopyEngineDispatch, tokens: int, chunks: int, most: int) -> None:
        self.dispatch, self.tokens, self.most = dispatch, tokens, most
        self.pieces, self.first_stays, self.ahead = max(chunks, 2), True, True
        self.parts = self.pieces - 1  # of the peers' rows

    def start(self, row_TD: Tensor, slots: Slots | None = None) -> _Leg:
        return _Leg(self, row_TD, slots)


class _Leg:
    def __init__(self, trip: _Trip, row_TD: Tensor, slots: Slots | None) -> None:
        self.trip, self.dispatch, self.memory = trip, trip.dispatch, trip.dispatch.memory
        self.dispatch.leg += 1
        self.number = self.dispatch.leg
        self.row_TD, self.slots = row_TD.contiguous(), slots
        self.own: tuple[Tensor, Tensor | None] | None = None
        shape, ranks = self.dispatch.shape, self.memory.size
        most = trip.most
        self.row_MD = row_TD.new_empty((ranks - 1) * most, shape.d_model)
        self.expert_MK: Tensor | None = None
        self.gate_MK: Tensor | None = None
        self.home_RTD = row_TD.new_empty(ranks - 1, most, shape.d_model)
        self.home_RTK: Tensor | None = None
        gates = self.dispatch.buffer(self.memory.rank, "out_gates")
        if slots is None:  # gradients, with those of gates
            self.home_RTK = gates.new_empty(ranks - 1, most, shape.top_k)
        else:
            self.gate_MK = gates.new_empty((ranks - 1) * most, shape.top_k)
            self.expert_MK = torch.empty_like(self.gate_MK, dtype=torch.int32)
        self.cuts = cuts(ranks, most, trip.parts)
        self.mine = self.dispatch.segments(self.memory.rank, trip.parts, most)
        for lane in range(LANES):  # where copies land is free: its former users are done
            self.memory.after(self.memory.mark(), lane)
        self._stage()
        self.arrived = self._fetch()
        self.returned: list[Any] = []

    def _stage(self) -> None:
        """This rank's rows into OUT, with what says that missing tokens are none; then tell the peers.

        Tokens go beside the sort of the own ones. Gradients go before their first use: a copy inside a GPU takes
        multiprocessors, and would wait for the kernel that takes them all, and the peers with it.
        """
        tokens, lane = self.trip.tokens, None if self.slots is None else ROWS
        rows, experts, gates = (
            self.dispatch.buffer(self.memory.rank, name)[: self.trip.most]
            for name in ("out_rows", "out_experts", "out_gates")
        )
        self.memory.copy(rows[:tokens], self.row_TD, lane)
        missing = [(rows, 0, lane)]
        if self.slots is not None:
            self.memory.write(experts[:tokens], self.slots[0], NUMBERS)
            self.memory.write(gates[:tokens], self.slots[1], NUMBERS)
            missing += [(experts, -1, NUMBERS), (gates, 0, NUMBERS)]
        if tokens < len(rows):
            for target, empty, beside in missing:
                self.memory.write(target[tokens:], empty, beside)
        self.memory.after(self.memory.mark(None if self.slots is None else NUMBERS), ROWS)
        for peer in self.dispatch.peers:
            self.memory.post(peer, self.dispatch.out_flag(self.memory.rank), self.number, ROWS)

    def _fetch(self) -> list[tuple[Any, Any]]:
        """Peers' rows, part by part; marks behind the slots and the rows of each.

        Slots come in front of their rows: from a lane of their own, for which there is no other copy engine, they came
        behind the rows of the peer before. They are sorted while the rows travel.
        """
        arrived = []
        for part, cut in enumerate(self.cuts):
            slots = None
            if self.slots is not None:
                self._fetch_part(part, cut.start, {"out_experts": self.expert_MK, "out_gates": self.gate_MK})
                slots = self.memory.mark(ROWS)
            self._fetch_part(part, cut.start, {"out_rows": self.row_MD})
            arrived.append((slots, self.memory.mark(ROWS)))
        return arrived

    def _fetch_part(self, part: int, position: int, wanted: dict[str, Tensor | None]) -> None:
        for seg in (seg for seg in self.mine if seg.part == part):
            landing, taken = slice(position, position + seg.stop - seg.start), slice(seg.start, seg.stop)
            self.memory.wait(self.dispatch.out_flag(seg.source), self.number, ROWS)
            for name, into in wanted.items():
                assert into is not None
                self.memory.copy(into[landing], self.dispatch.buffer(seg.source, name)[taken], ROWS)
            position = landing.stop

    def arrive(self, piece: int) -> Arrived:
        land = partial(self._land, piece)
        if piece == 0:
            return self.row_TD, self.slots, land
        rows = self.cuts[piece - 1]
        if self.expert_MK is None or self.gate_MK is None:
            return self.row_MD[rows], None, land
        self.memory.after(self.arrived[piece - 1][0])
        return self.row_MD[rows], (self.expert_MK[rows], self.gate_MK[rows]), land

    def _land(self, piece: int) -> None:
        if piece > 0:
            self.memory.after(self.arrived[piece - 1][1])

    def room(self, piece: int) -> Tensor | None:
        """Where a part of the peers' rows goes home from, if that is one stretch of memory; own rows go nowhere."""
        if piece == 0:
            return None
        places = self._places("home_rows", piece - 1)
        return places[0][1] if len(places) == 1 else None

    def _places(self, name: str, part: int) -> list[tuple[slice, Tensor]]:
        """Rows of a part, and their place at home: one, unless there is room for more tokens than peers have."""
        home = self.dispatch.buffer(self.memory.rank, name)
        if self.trip.most == home.shape[1]:
            return [(slice(None), home.flatten(0, 1)[self.cuts[part]])]
        places, position = [], 0
        for seg in (seg for seg in self.mine if seg.part == part):
            given = slice(position, position + seg.stop - seg.start)
            index = self.dispatch.peers.index(seg.source)
            places.append((given, home[index, seg.start : seg.stop]))
            position = given.stop
        return places

    def give(self, piece: int, row_MD: Tensor, gate_MK: Tensor | None = None) -> None:
        """Flags are posted between two kernels, which costs 10 us. From a stream beside they come late, which only
        gradients can afford: weight gradients hide their way home several times over."""
        if piece == 0:
            self.own = row_MD, gate_MK
            return
        made = {"home_rows": row_MD} if gate_MK is None else {"home_rows": row_MD, "home_gates": gate_MK}
        if gate_MK is None:
            self.home_RTK = None
        for name, sums in made.items():
            for given, home in self._places(name, piece - 1):
                if home.data_ptr() != sums[given].data_ptr():
                    home.copy_(sums[given])
        lane = None if gate_MK is None else NUMBERS
        if lane is not None:
            self.memory.after(self.memory.mark(), lane)
        for seg in (seg for seg in self.mine if seg.part == piece - 1):
            self.memory.post(seg.source, self.dispatch.home_flag(self.memory.rank, seg.part), self.number, lane)
        self._fetch_home(piece - 1)

    def _fetch_home(self, part: int) -> None:
        """What peers' experts make of this rank's rows in that part of theirs. Its landing place is there from the
        start, so nothing here waits for this rank's experts."""
        rank = self.memory.rank
        for index, peer in enumerate(reversed(self.dispatch.peers)):  # the one whose first peer this rank is, first
            for seg in self.dispatch.segments(peer, self.trip.parts, self.trip.most):
                if (seg.part, seg.source) != (part, rank):
                    continue
                place, there = slice(seg.start, seg.stop), (rank - peer - 1) % self.memory.size
                for name, into, lane in (("home_rows", self.home_RTD, ROWS), ("home_gates", self.home_RTK, NUMBERS)):
                    if into is not None:
                        self.memory.wait(self.dispatch.home_flag(peer, part), self.number, lane)
                        self.memory.copy(into[index, place], self.dispatch.buffer(peer, name)[there, place], lane)
        if part == self.trip.parts - 1:
            self.returned = [self.memory.mark(lane) for lane in range(LANES)]

    def rest(self) -> Callable[[], tuple[Tensor, Tensor | None]]:
        def came_home() -> tuple[Tensor, Tensor | None]:
            for mark in self.returned:
                self.memory.after(mark)
            return self.home_RTD, self.home_RTK

        return came_home

    def collect(self) -> tuple[Tensor, Tensor | None]:
        assert self.own is not None
        return self.own


def build(
    n_experts: int, group: dist.ProcessGroup | None, shape: ExchangeShape, chunks: str | int = "auto"
) -> CopyEngineDispatch:
    """Raises ValueError where ranks cannot read each other's memory, for chunk counts below 2 or without flags, and for
    varying slots."""
    if group is None:
        raise ValueError("dispatch=copy_engine needs torch.distributed; nearest legal value: dispatch=local")
    if group.size() == 1:
        raise ValueError("dispatch=copy_engine with parallel.ep=1 has no peers; nearest legal value: dispatch=local")
    if chunks == 1:
        raise ValueError("dispatch.chunks=1 leaves nothing beside which to copy; nearest legal value: 2")
    if isinstance(chunks, int) and chunks > MOST_PARTS + 1:
        raise ValueError(f"dispatch.chunks={chunks} (copy_engine); nearest legal value: {MOST_PARTS + 1}")
    if not shape.fixed_slots:
        raise ValueError("dispatch=copy_engine with router.rounding, whose slots vary; nearest legal value: collective")
    reason = unreachable(group, shape.device_type)
    if reason is not None:
        raise ValueError(f"dispatch=copy_engine {reason}; nearest legal value: dispatch=collective")
    choice = Chunks("copy_engine", chunks, CopyEngineDispatch.CHUNKS, group)
    return CopyEngineDispatch(n_experts, SymmetricMemory(group, regions(shape, group.size())[1]), shape, choice)
