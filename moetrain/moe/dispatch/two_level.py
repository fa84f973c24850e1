"""Between nodes rows travel by all-to-all, inside a node they spread by another dispatcher, best by the copy engines.

Nodes hold L ranks each; local rank l of a node talks to local rank l of the others only, its rail of the network.
    across  a token's row goes once to each node that holds any of its experts, along its owner's rail
    inside  for the node's dispatcher the row lives where it landed: from there it spreads to the node's ranks that hold
            its experts, their sums come back and are added up
    across  one row per (token, node) goes home
Both are the exchange of exchange.py, one inside the other: what the outer one takes for experts is the node's
dispatcher, and the backward pass nests the same way. With several pieces the own node's rows spread while others cross.

One host synchronisation a layer: every rank's row counts to every node, by one all-gather.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.compat import all_gather_single
from moetrain.comm.nodes import find_nodes, irregular, node_group
from moetrain.comm.peer import unreachable
from moetrain.comm.reading import Reading
from moetrain.moe.dispatch import allgather, copy_engine
from moetrain.moe.dispatch.base import Dispatcher, ExchangeShape, Weights
from moetrain.moe.dispatch.chunks import Chunks
from moetrain.moe.dispatch.collective import AllToAllTrip
from moetrain.moe.dispatch.exchange import exchange
from moetrain.moe.dispatch.rows import cut, moved, places, rows_of_parts, rows_of_tokens, tokens_at, wanted_by_rank
from moetrain.moe.dispatch.wire import check_wire
from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.types import Routing

INSIDE = ("auto", "copy_engine", "allgather")


class TwoLevelDispatch:
    """n_experts: routed experts over the whole group; expert e is on rank e // (E / ep), nodes are blocks of ranks.

    inside: dispatcher of this rank's node, of `local` ranks with E / nodes experts; its ExchangeShape.tokens is the
    group's times the number of nodes. chunks: calls of `inside`, as in dispatch=collective with nodes for ranks.
    fp8: hidden states from other nodes travel as 8-bit floats (wire.py).
    """

    CHUNKS = (1, 2, 3, 4)  # what a measurement chooses from

    def __init__(
        self,
        n_experts: int,
        group: dist.ProcessGroup,
        local: int,
        inside: Dispatcher,
        chunks: Chunks,
        fp8: bool = False,
    ) -> None:
        assert n_experts % group.size() == 0
        assert group.size() % local == 0
        self.group, self.rank, self.local, self.inside = group, group.rank(), local, inside
        self.nodes, self.node = group.size() // local, group.rank() // local
        self.node_experts = n_experts // self.nodes
        self.chunks, self.fp8 = chunks, fp8

    def __call__(self, x_TD: Tensor, routing: Routing, experts: ExpertBackend, weights: Weights) -> Tensor:
        def run(chunks: int, x_TD: Tensor, routing: Routing, weights: Weights) -> Tensor:
            trip, most = self._trip(routing, chunks)
            bounds = iter(most)

            def in_node(
                x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor
            ) -> Tensor:
                landed = replace(routing, expert_TK=expert_TK, gate_TK=gate_TK, kept=None, beside=None, bounded=False)
                landed = replace(landed, most=next(bounds))
                return self.inside(x_TD, landed, experts, (w_gate_up_E2FD, w_down_EDF))

            first = self.node * self.node_experts
            return exchange(x_TD, routing, trip, in_node, weights, first)

        return run(self.chunks.of(run, x_TD, routing, weights), x_TD, routing, weights)

    def _trip(self, routing: Routing, chunks: int) -> tuple[AllToAllTrip, list[int]]:
        """And for each piece the most rows of it that a rank of this node gets."""
        wanted_NT = wanted_by_rank(routing.expert_TK, self.node_experts, self.nodes)
        counts = self._start_counts(wanted_NT, routing)
        place_NT = places(wanted_NT)
        token_S = tokens_at(place_NT)
        counts_RN = self._counts(counts, routing)
        send, receive = self._rail(counts_RN, self.rank)
        parts = cut(token_S[: sum(send)], send, receive, self.rank, chunks)
        row_TN = rows_of_tokens(place_NT)
        if chunks > 1:
            row_TN = moved(row_TN, cut(torch.arange(sum(send), device=row_TN.device), send, receive, self.rank, chunks))
        here = range(self.node * self.local, (self.node + 1) * self.local)
        landing = [rows_of_parts(self._rail(counts_RN, rank)[1], rank, chunks) for rank in here]
        most = [max(1, *rows) for rows in zip(*landing)]  # collectives dislike empty tensors
        return AllToAllTrip(self.group, parts, row_TN, fp8=self.fp8), most

    def _rail(self, counts_RN: list[list[int]], rank: int) -> tuple[list[int], list[int]]:
        """Rows that `rank` sends to and gets from each rank of the group: none but those with its local number."""
        send, receive = [0] * self.group.size(), [0] * self.group.size()
        for node in range(self.nodes):
            peer = node * self.local + rank % self.local
            send[peer] = counts_RN[rank][node]
            receive[peer] = counts_RN[peer][rank // self.local]
        return send, receive

    def _start_counts(self, wanted_NT: Tensor, routing: Routing) -> Reading | None:
        """Exchanged once: a recomputed pass has the same routing."""
        if routing.kept is not None and routing.kept.rows is not None:
            return None
        found = torch.empty(self.group.size() * self.nodes, dtype=torch.int64, device=wanted_NT.device)
        all_gather_single(found, wanted_NT.sum(dim=1), group=self.group)
        return Reading(found.view(-1, self.nodes))

    def _counts(self, counts: Reading | None, routing: Routing) -> list[list[int]]:
        """[rank][node]."""
        if counts is None:
            assert routing.kept is not None
            return routing.kept.rows
        found = counts.tolist()  # the one host synchronisation
        if routing.kept is not None:
            routing.kept.rows = found
        return found


def build(
    n_experts: int,
    group: dist.ProcessGroup | None,
    shape: ExchangeShape,
    chunks: str | int = "auto",
    node_size: str | int = "auto",
    inside: str = "auto",
    wire: str = "full",
) -> TwoLevelDispatch:
    """node_size: ranks of the ep group that share a node, "auto" to look. inside: the node's dispatcher.

    Raises ValueError without several regular nodes of several ranks, and for wrong options.
    """
    if group is None:
        raise ValueError("dispatch=two_level needs torch.distributed; nearest legal value: dispatch=local")
    if inside not in INSIDE:
        raise ValueError(f"dispatch.inside={inside!r} is not one of {', '.join(INSIDE)}; nearest legal value: auto")
    check_wire("two_level", wire, shape)
    choice = Chunks("two_level", chunks, TwoLevelDispatch.CHUNKS, group)
    nodes = find_nodes(group, shape.device_type, node_size)
    reason = unfit(nodes)
    if reason is not None:
        raise ValueError(f"dispatch=two_level {reason}; nearest legal value: dispatch=collective")
    peers = node_group(group, nodes)
    landing = replace(shape, tokens=shape.tokens * len(nodes), rows=None)
    node = _inside(inside, n_experts // len(nodes), peers, landing)
    return TwoLevelDispatch(n_experts, group, peers.size(), node, choice, wire == "fp8")


def unfit(nodes: list[list[int]]) -> str | None:
    """Why an ep group on these nodes has no use for two levels; None if it has."""
    reason = irregular(nodes)
    if reason is None and len(nodes) == 1:
        return f"finds its {len(nodes[0])} ranks on one node"
    if reason is None and len(nodes[0]) == 1:
        return "finds one rank on each node"
    return reason


def _inside(name: str, n_experts: int, peers: dist.ProcessGroup, shape: ExchangeShape) -> Dispatcher:
    reason = unreachable(peers, shape.device_type) if shape.fixed_slots else "needs router.rounding.tile=0"
    if name == "copy_engine" and reason is not None:
        raise ValueError(f"dispatch.inside=copy_engine {reason}; nearest legal value: allgather")
    if name != "allgather" and reason is None:
        return copy_engine.build(n_experts, peers, shape, 2)  # this rank's rows, then those of its peers
    if name == "auto" and dist.get_rank() == 0:
        print(f"dispatch two_level: inside a node allgather (copy_engine {reason})", flush=True)
    return allgather.build(n_experts, peers, shape, 1)
