"""Switch/GShard auxiliary loss ("Switch Transformers"; "GShard")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moetrain.comm.collectives import all_reduce_sum
from moetrain.config.values import require_range
from moetrain.moe.balance.base import Balance
from moetrain.moe.router.common import count_experts, top_k
from moetrain.moe.types import Routing

SCOPES = ("sequence", "micro_batch", "global_batch")


class SwitchLoss(Balance):
    """coefficient * E * sum_e f_e P_e: f_e the share of choices on expert e, P_e its mean balance score.

    scope says over which tokens f and P are taken before they are multiplied:
      sequence      each packed row by itself, then the mean over the global batch's rows: the same under every layout
                    and micro-batch split;
      micro_batch   one micro-step's tokens over all data ranks, then the mean over micro-steps;
      global_batch  f over the micro-steps of this optimizer step so far, P over the micro-step at hand.
    f counts the top-k of the balance scores, so selection biases, group limits, and drops do not hide an imbalance.
    At perfect balance the loss is `coefficient`.
    """

    running_E: Tensor | None

    def __init__(self, n_experts: int, coefficient: float = 0.01, scope: str = "sequence") -> None:
        super().__init__()
        require_range("coefficient", coefficient, 0, math.inf)
        if scope not in SCOPES:
            raise ValueError(f"scope={scope!r}: nearest legal value: sequence (of {', '.join(SCOPES)})")
        self.n_experts, self.coefficient, self.scope = n_experts, coefficient, scope
        self.running_E = None

    def on_routing(self, routing: Routing) -> Tensor:
        score_TE, valid_T = routing.balance_TE, routing.context.valid_T
        counted_TK = routing.context.counted_TK
        if counted_TK is None:
            counted_TK = top_k(score_TE, routing.top_k)
        expert_TK = torch.where(valid_T[:, None], counted_TK, -1)
        score_TE = torch.where(valid_T[:, None], score_TE, 0.0)
        scale = self.coefficient * self.n_experts
        if self.scope == "sequence":
            return scale * self._by_row(score_TE, expert_TK, routing)
        count_E = all_reduce_sum(count_experts(expert_TK, self.n_experts), self.tokens)
        totals = routing.context.totals
        if self.scope == "micro_batch":
            share_E = _share(count_E).to(score_TE.dtype)
            tokens = all_reduce_sum(valid_T.sum(), self.tokens).clamp(min=1)
            return scale * (share_E * score_TE.sum(0)).sum() / tokens / totals.micro_batches
        self.running_E = count_E if self.running_E is None else self.running_E + count_E
        share_E = _share(self.running_E).to(score_TE.dtype)
        return scale * (share_E * score_TE.sum(0)).sum() / totals.tokens.to(score_TE.dtype)

    def _by_row(self, score_TE: Tensor, expert_TK: Tensor, routing: Routing) -> Tensor:
        rows = routing.context.rows
        row_T1 = torch.arange(rows, device=expert_TK.device).repeat_interleave(expert_TK.shape[0] // rows)[:, None]
        key_TK = torch.where(expert_TK >= 0, row_T1 * self.n_experts + expert_TK, -1)
        count_BE = count_experts(key_TK, rows * self.n_experts).view(rows, self.n_experts)
        tokens_B1 = routing.context.valid_T.view(rows, -1).sum(1, keepdim=True)
        # Counts are the whole row's; scores stay this stretch's, so that the ranks' losses and gradients add up.
        sums = all_reduce_sum(torch.cat([count_BE, tokens_B1], dim=1), self.row)
        count_BE, tokens_B1 = sums[:, :-1], sums[:, -1:].clamp(min=1)
        mean_BE = score_TE.view(rows, -1, self.n_experts).sum(1) / tokens_B1
        return (_share(count_BE).to(mean_BE.dtype) * mean_BE).sum() / routing.context.totals.rows

    def before_step(self, count_E: Tensor) -> None:
        self.running_E = None

    def no_step(self) -> None:
        self.running_E = None


def _share(count: Tensor) -> Tensor:
    """Counts [..., E] as fractions of their sum; zero where there are none."""
    return count.double() / count.sum(-1, keepdim=True).clamp(min=1)
