"""Token rounding: every expert gets a multiple of `tile` tokens of each row ("SonicMoE", token rounding).

An expert's matmul works in tiles of rows, and a tile that is not full costs as much as a full one. After the top-k
choice each expert's count is rounded to a multiple of the tile: an expert with too many tokens gives up those with the
least weight, one with too few takes the best of those that did not choose it. Ranking, per packed row and expert:
tokens that chose it come first, by its share of their gates (by score if each token has one expert); then the others,
by score.

Which tokens an expert gets depends on later tokens of the row, so evaluations route by plain top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.shards import gather_shards
from moetrain.moe.router.common import top_k
from moetrain.moe.types import Routing, TokenContext

MODES = ("nearest", "up", "down")
STEPS = 1 << 20  # ranks are compared in steps of 1 / STEPS: see _ranks
PLACE_BITS = 40  # places in a global batch take fewer


class TokenRounding:
    """tile: the multiple. mode: which one. scale: of the router's gates.

    row: the ranks that hold the other stretches of this rank's rows, None if rows are whole here. tokens: all ranks
    that route the other tokens of a micro-step. Both are set by parallel/ep.py.

    Slots of a rounded choice: first the router's own K, where an expert e that the token lost is written -2 - e (any
    negative id is an unused slot; this one can be read back when activations are recomputed), then experts that took
    the token beyond its own choice. Their number is the same on all ranks: one all-reduce, waited for on the host. It
    is a power of 2 (or E): kernels are compiled for a number of slots, at seconds each.
    """

    def __init__(self, tile: int, mode: str, scale: float) -> None:
        if mode not in MODES:
            raise ValueError(f"router.rounding.mode={mode!r}: nearest legal value: nearest (of {', '.join(MODES)})")
        self.tile, self.mode, self.scale = tile, mode, scale
        self.row: dist.ProcessGroup | None = None
        self.tokens: dist.ProcessGroup | None = None

    def own_choice(self, context: TokenContext, k: int) -> TokenContext:
        """What a recomputed pass must choose before rounding; a free context stays free."""
        if context.chosen_TK is None:
            return context
        own_TK = context.chosen_TK[:, :k]
        return replace(context, chosen_TK=torch.where(own_TK < -1, -2 - own_TK, own_TK))

    def __call__(self, routing: Routing, score_TE: Tensor, context: TokenContext) -> Routing:
        """The rounded routing. score_TE: the router's differentiable score in [0, 1], the gate of tokens taken over.

        `count_E` stays the router's own choice: a bias controller must see the imbalance that rounding hides.
        """
        if context.chosen_TK is not None:
            expert_TW = context.chosen_TK
        elif torch.is_grad_enabled():
            expert_TW = self._round(routing, score_TE.detach())
        else:
            return routing
        k = routing.expert_TK.shape[1]
        more_TA = expert_TW[:, k:]
        taken_TA = score_TE.gather(1, more_TA.clamp(min=0)) * self.scale
        gate_TW = torch.cat([routing.gate_TK, taken_TA], dim=1)
        return replace(routing, expert_TK=expert_TW, gate_TK=torch.where(expert_TW >= 0, gate_TW, 0.0))

    @torch.no_grad()
    def _round(self, routing: Routing, score_TE: Tensor) -> Tensor:
        own_TK, n_experts = routing.expert_TK, score_TE.shape[1]
        share_TK = routing.gate_TK / routing.gate_TK.sum(1, keepdim=True).clamp(min=1e-30)
        if own_TK.shape[1] == 1:  # every share is 1
            share_TK = score_TE.gather(1, own_TK.clamp(min=0))
        slot_TK = torch.where(own_TK >= 0, own_TK, n_experts)  # padding's choice falls into a column that is cut off
        share_TE = torch.full_like(torch.nn.functional.pad(score_TE, (0, 1)), -1.0)
        share_TE = share_TE.scatter(1, slot_TK, share_TK.to(score_TE.dtype))[:, :n_experts]
        chose_TE = share_TE >= 0
        rank_TE = _ranks(chose_TE, torch.where(chose_TE, share_TE, score_TE), routing.context)
        keep_TE = self._keep(rank_TE, chose_TE, routing.context)
        lost_TK = (own_TK >= 0) & ~keep_TE.gather(1, own_TK.clamp(min=0))
        taken_TE = keep_TE & ~chose_TE
        most = taken_TE.sum(1).max() if taken_TE.numel() else taken_TE.new_zeros((), dtype=torch.int64)
        if self.tokens is not None:
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.tokens)
        more_TA = top_k(taken_TE.to(torch.uint8), power_of_2(int(most)))
        more_TA = torch.where(taken_TE.gather(1, more_TA), more_TA, -1)
        return torch.cat([torch.where(lost_TK, -2 - own_TK, own_TK), more_TA], dim=1)

    def _keep(self, rank_TE: Tensor, chose_TE: Tensor, context: TokenContext) -> Tensor:
        """bool [T, E]: the tokens of each expert, of which the highest rank come first."""
        rows, n_experts = context.rows, rank_TE.shape[1]
        rank_BSE = rank_TE.view(rows, -1, n_experts)
        count_BE = torch.stack([chose_TE.view(rows, -1, n_experts).sum(1), (rank_BSE >= 0).sum(1)])
        whole_BSE = rank_BSE
        if self.row is not None:
            whole_BSE = gather_shards(rank_BSE, 1, self.row)
            dist.all_reduce(count_BE, group=self.row)
        chosen_BE, valid_BE = count_BE
        target_BE = torch.minimum(round_to(chosen_BE, self.tile, self.mode), valid_BE // self.tile * self.tile)
        sorted_BSE = whole_BSE.sort(dim=1, descending=True).values
        least_BE = sorted_BSE.gather(1, (target_BE - 1).clamp(min=0)[:, None]).squeeze(1)
        return ((rank_BSE >= least_BE[:, None]) & (target_BE > 0)[:, None]).view_as(rank_TE)


def build_rounding(options: Mapping[str, Any] | None, scale: float) -> TokenRounding | None:
    """From a router's option `rounding`, {tile, mode}; None where tile is 0. ValueError for other keys and values."""
    known = {"tile": 0, "mode": "nearest", **(options or {})}
    for key in set(known) - {"tile", "mode"}:
        raise ValueError(f"router.rounding.{key}: no such key; nearest legal keys: tile, mode")
    if not isinstance(known["tile"], int) or known["tile"] < 0:
        raise ValueError(f"router.rounding.tile={known['tile']}: nearest legal value: 0 (off)")
    return TokenRounding(known["tile"], known["mode"], scale) if known["tile"] else None


def round_to(count: Tensor, tile: int, mode: str) -> Tensor:
    """Multiples of `tile`: the nearest (half goes up), the next above, or the next below."""
    return (count + {"nearest": tile // 2, "up": tile - 1, "down": 0}[mode]) // tile * tile


def power_of_2(n: int) -> int:
    """The smallest that is at least n, for n of at least 1; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


def _ranks(chose_TE: Tensor, value_TE: Tensor, context: TokenContext) -> Tensor:
    """int64 [T, E], no two alike in a row and column: who chose the expert, then value, then the earlier place.

    Values count in steps of 1 / STEPS only. Equal tokens in equal surroundings (the first of two documents) have equal
    scores up to rounding, which depends on the layout; their place must decide. Padding is -1.
    """
    step_TE = (value_TE.clamp(0, 1) * STEPS).round().long()
    place_BS = context.index_BS
    if place_BS is None:
        place_BS = torch.arange(value_TE.shape[0], device=value_TE.device).view(context.rows, -1)
    earlier_T1 = (1 << PLACE_BITS) - 1 - place_BS.flatten()[:, None]
    rank_TE = ((chose_TE.long() * 2 * STEPS + step_TE) << PLACE_BITS) + earlier_T1
    return torch.where(context.valid_T[:, None], rank_TE, -1)
