"""Tokens travel by uneven all-to-all (NCCL or gloo): works on every machine and between nodes.

A token is sent once to each rank that holds at least one of its experts, with the ids and gates of those experts. There
the weighted sum over them is formed, and one row comes back. That is fewer bytes than one row per expert both ways.
One host synchronisation per call: the collective needs its row counts on the host.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.collectives import all_to_all_rows
from moetrain.moe.dispatch.base import ExpertFn
from moetrain.moe.types import Routing


class CollectiveDispatch:
    """n_experts: routed experts over the whole group, a multiple of its size; expert e is on rank e // (E / ep)."""

    def __init__(self, n_experts: int, group: dist.ProcessGroup) -> None:
        assert n_experts % group.size() == 0, "validate.py refuses experts that do not divide evenly"
        self.group = group
        self.ep = group.size()
        self.local_experts = n_experts // self.ep

    def __call__(self, x_TD: Tensor, routing: Routing, experts: ExpertFn) -> Tensor:
        tokens, ep = max(x_TD.shape[0], 1), self.ep
        expert_TK, gate_TK = routing.expert_TK, routing.gate_TK
        owner_TK = torch.where(expert_TK >= 0, expert_TK // self.local_experts, -1)
        wanted_RT = owner_TK.T[None] == torch.arange(ep, device=x_TD.device)[:, None, None]  # [R, K, T]
        wanted_RT = wanted_RT.any(dim=1)
        send, receive = self._row_counts(wanted_RT.sum(dim=1), routing)

        # One row for each (rank, token) that is wanted, rank by rank: position p holds token token_N[p].
        where_N = _positions(wanted_RT.flatten(), sum(send))
        rank_N, token_N = where_N // tokens, where_N % tokens
        here_NK = owner_TK[token_N] == rank_N[:, None]
        slot_NK = torch.where(here_NK, expert_TK[token_N] - rank_N[:, None] * self.local_experts, -1)
        weight_NK = torch.where(here_NK, gate_TK[token_N], 0.0)

        rows_MD = all_to_all_rows(x_TD[token_N], send, receive, self.group)
        gates_MK = all_to_all_rows(weight_NK, send, receive, self.group)
        slots_MK = all_to_all_rows(slot_NK.to(torch.int32), send, receive, self.group)
        partial_MD = experts(rows_MD, slots_MK.long(), gates_MK)
        partial_ND = all_to_all_rows(partial_MD, receive, send, self.group)
        return torch.zeros_like(x_TD).index_add(0, token_N, partial_ND.to(x_TD.dtype))

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


def _positions(flag_N: Tensor, total: int) -> Tensor:
    """Indices of the `total` true entries, in order: torch.nonzero without its host synchronisation."""
    rank_N = torch.where(flag_N, flag_N.cumsum(0) - 1, total)  # the entry past the end takes what is false
    index_N = torch.arange(flag_N.numel(), device=flag_N.device)
    return torch.empty(total + 1, dtype=torch.int64, device=flag_N.device).scatter_(0, rank_N, index_N)[:total]


def build(n_experts: int, group: dist.ProcessGroup | None) -> CollectiveDispatch:
    """Raises ValueError without a process group."""
    if group is None:
        raise ValueError("dispatch=collective needs torch.distributed; nearest legal value: dispatch=local")
    return CollectiveDispatch(n_experts, group)
