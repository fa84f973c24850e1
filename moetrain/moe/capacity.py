"""Capacity: the most tokens that an expert takes of a row; what is chosen beyond that is dropped.

C = ceil(factor * K * valid tokens / E), at least `minimum` ("GShard", arXiv:2006.16668; "Switch Transformers",
arXiv:2101.03961). Who stays, of those that chose an expert:

    position        the first in the row
    probability     those with the largest gates
    batch_priority  first choices before second ones, among them tokens with the largest gate first ("Scaling Vision
                    with Sparse Mixture of Experts", arXiv:2106.05974)
    random          by a number drawn from (seed, step, layer, the token's place in the global batch)

All but `position` and `random` let later tokens decide over earlier ones. Evaluation drops nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.row import whole_rows
from moetrain.moe.types import Routing

DROPS = ("position", "probability", "batch_priority", "random")
STEPS = 1 << 20  # gates are compared in steps of 1 / STEPS
SCOPES = ("sequence", "rank")


class Capacity:
    """One layer's.

    scope: `sequence` counts whole rows, gathered over the ranks that share them, so that no layout changes what is
    dropped; `rank` counts all tokens of this rank's micro-batch together, which depends on the layout.
    renormalize: scale a token's remaining gates to the sum of all it had.
    pad: send to each rank as many rows as could ever be wanted of it, so that shapes do not depend on the routing.
    row: the ranks that hold stretches of this rank's rows; parallel/ep.py sets it.
    """

    def __init__(
        self,
        factor: float,
        drop: str = "probability",
        scope: str = "sequence",
        renormalize: bool = False,
        minimum: int = 1,
        pad: bool = False,
        *,
        n_experts: int,
        seed: Sequence[int] = (),
    ) -> None:
        if not factor > 0 or not math.isfinite(factor):
            raise ValueError(f"dispatch.capacity.factor={factor} is not above 0; nearest legal value: 1.0 (0 for none)")
        for key, value, choices in (("drop", drop, DROPS), ("scope", scope, SCOPES)):
            if value not in choices:
                options = ", ".join(choices)
                raise ValueError(
                    f"dispatch.capacity.{key}={value!r} is not one of {options}; nearest legal value: {choices[0]}"
                )
        if minimum < 0:
            raise ValueError(f"dispatch.capacity.minimum={minimum} is below 0; nearest legal value: 0")
        self.factor, self.drop, self.scope = factor, drop, scope
        self.renormalize, self.minimum, self.pad = renormalize, minimum, pad
        self.n_experts, self.seed = n_experts, tuple(seed)
        self.row: dist.ProcessGroup | None = None

    def most(self, tokens: int, slots: int) -> int:
        """C of a scope of `tokens`, none of them padding."""
        return max(math.ceil(self.factor * slots * tokens / self.n_experts - 1e-9), self.minimum)

    @torch.no_grad()
    def keep(self, routing: Routing) -> Tensor:
        """bool [T, K]: the choices that stay. Collective over the row's ranks."""
        context = routing.context
        assert context.index_BS is not None, "capacity needs to know where tokens stand"
        shape = (context.rows, -1, routing.expert_TK.shape[1])
        parts = [routing.expert_TK.view(shape), routing.gate_TK.view(shape), context.document_BS >= 0, context.index_BS]
        top_k = routing.top_k or shape[2]  # rounding may have added slots
        if self.scope == "rank":
            return self._keep([part.flatten(0, 1)[None] for part in parts], top_k, context.step)[0]
        row = whole_rows(context.index_BS, self.row)
        return row.own(self._keep([row.whole(part) for part in parts], top_k, context.step)).flatten(0, 1)

    def _keep(self, parts: list[Tensor], top_k: int, step: int) -> Tensor:
        expert_BSK, gate_BSK, valid_BS, index_BS = parts
        wanted_B1 = self.factor * top_k * valid_BS.sum(1, keepdim=True).double() / self.n_experts
        most_B1 = (wanted_B1 - 1e-9).ceil().clamp(min=self.minimum)
        # Equal tokens in equal surroundings have equal gates up to rounding, which depends on the layout. In steps they
        # are equal, and equal keys leave the first in the row in front.
        step_BSK = -(gate_BSK * STEPS).round()
        keys: list[Tensor] = []  # the weightiest first
        if self.drop == "probability":
            keys = [step_BSK]
        elif self.drop == "batch_priority":
            choice_BSK = torch.arange(expert_BSK.shape[2], device=expert_BSK.device).expand_as(expert_BSK)
            keys = [choice_BSK, step_BSK.amin(-1, keepdim=True).expand_as(step_BSK)]
        elif self.drop == "random":
            keys = [_scramble(index_BS, (*self.seed, step))[..., None].expand_as(expert_BSK)]
        return _first(expert_BSK, keys, most_B1, self.n_experts)


def _first(expert_BSK: Tensor, keys: list[Tensor], most_B1: Tensor, n_experts: int) -> Tensor:
    """bool [B, S, K]: whether fewer than `most` of the row's choices of the same expert come before this one."""
    expert_BN = torch.where(expert_BSK >= 0, expert_BSK, n_experts).flatten(1)
    order_BN = torch.arange(expert_BN.shape[1], device=expert_BN.device).expand_as(expert_BN)
    for key in (*reversed([key.flatten(1) for key in keys]), expert_BN):
        order_BN = order_BN.gather(1, key.gather(1, order_BN).argsort(dim=1, stable=True))
    sorted_BN = expert_BN.gather(1, order_BN)
    before_BN = torch.arange(expert_BN.shape[1], device=expert_BN.device) - torch.searchsorted(sorted_BN, sorted_BN)
    stays_BN = (before_BN < most_B1) & (sorted_BN < n_experts)
    return torch.empty_like(stays_BN).scatter_(1, order_BN, stays_BN).view_as(expert_BSK)


def _scramble(index_BS: Tensor, seed: tuple[int, ...]) -> Tensor:
    """int64 that look random and depend on the seed and each index only (the finisher of splitmix64)."""
    digest = hashlib.sha256(repr(seed).encode()).digest()
    x = index_BS * -7046029254386353131 + int.from_bytes(digest[:8], "little", signed=True)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))


def without_dropped(routing: Routing, keep_TK: Tensor, capacity: Capacity) -> Routing:
    """The routing that is dispatched: dropped choices are unused slots."""
    gate_TK = torch.where(keep_TK, routing.gate_TK, 0.0)
    if capacity.renormalize:
        rest_T1 = gate_TK.sum(-1, keepdim=True)
        scale_T1 = torch.where(rest_T1 > 0, routing.gate_TK.sum(-1, keepdim=True) / rest_T1.clamp(min=1e-20), 1.0)
        gate_TK = gate_TK * scale_T1
    expert_TK = torch.where(keep_TK, routing.expert_TK, -1)
    return replace(routing, expert_TK=expert_TK, gate_TK=gate_TK, bounded=capacity.pad)


def rows_bound(capacity: Capacity, rows: int, stretch: int, seq_len: int, slots: int, ranks: int) -> int:
    """The most tokens that a rank can send to another of `ranks`, if it has `stretch` tokens of each of `rows` rows."""
    there = capacity.n_experts // ranks
    if capacity.scope == "rank":
        return min(rows * stretch, there * capacity.most(rows * stretch, slots))
    return rows * min(stretch, there * capacity.most(seq_len, slots))
