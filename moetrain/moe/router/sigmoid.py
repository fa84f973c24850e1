"""Sigmoid top-k routing with an optional limit on expert groups ("DeepSeek-V3 Technical Report")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.config.values import require_above_0
from moetrain.moe.router.common import check_kernels, choose, make_routing, router_logits, top_k
from moetrain.moe.router.fused import fused_routing, usable
from moetrain.moe.router.rounding import build_rounding
from moetrain.moe.types import Routing, TokenContext


class SigmoidTopK(nn.Module):
    """s = sigmoid(z); experts are chosen by s + bias, gates are s of the chosen, optionally normalised, times scale.

    n_groups > 1: experts form equal contiguous groups, a group scores the sum of its two best biased scores, and only
    the best topk_groups groups take part. The balance score is s divided by its sum over experts.
    rounding: {tile, mode} of router/rounding.py. kernels: torch | triton | auto (triton where it can run, which is not
    with groups).
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        renormalize: bool = True,
        scale: float = 1.0,
        n_groups: int = 1,
        topk_groups: int = 1,
        rounding: Mapping[str, Any] | None = None,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        require_above_0("scale", scale, 1.0)
        if n_groups < 1 or n_experts % n_groups:
            raise ValueError(f"router.n_groups={n_groups} does not divide {n_experts} experts; nearest legal value: 1")
        if not 1 <= topk_groups <= n_groups:
            nearest = min(max(topk_groups, 1), n_groups)
            raise ValueError(f"router.topk_groups={topk_groups} of {n_groups} groups; nearest legal value: {nearest}")
        if topk_groups * (n_experts // n_groups) < top_k:
            nearest = -(-top_k * n_groups // n_experts)
            raise ValueError(
                f"router.topk_groups={topk_groups} leaves fewer than top_k={top_k} experts; "
                f"nearest legal value: {nearest}"
            )
        if n_groups > 1 and kernels == "triton":
            raise ValueError(f"router.kernels=triton with router.n_groups={n_groups}; nearest legal value: torch")
        self.top_k, self.renormalize, self.scale = top_k, renormalize, scale
        self.n_groups, self.topk_groups = n_groups, topk_groups
        self.rounding, self.kernels = build_rounding(rounding, scale), check_kernels(kernels)
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))

    def forward(
        self, x_TD: Tensor, context: TokenContext, bias_E: Tensor | None = None, carry: Tensor | None = None
    ) -> Routing:
        logit_TE = router_logits(x_TD, self.weight)
        if self.rounding is None:
            return self._top_k(logit_TE, context, bias_E)
        routing = self._top_k(logit_TE, self.rounding.own_choice(context, self.top_k), bias_E)
        return self.rounding(routing, logit_TE.sigmoid(), context)

    def _top_k(self, logit_TE: Tensor, context: TokenContext, bias_E: Tensor | None) -> Routing:
        renormalize = self.renormalize and self.top_k > 1
        if self.n_groups == 1 and usable(self.kernels, logit_TE):
            rule = {"score": "sigmoid", "renormalize": renormalize, "scale": self.scale}
            return fused_routing(logit_TE, self.top_k, context, bias_E, **rule)
        score_TE = logit_TE.sigmoid()
        selection_TE = score_TE.detach() if bias_E is None else score_TE.detach() + bias_E
        if self.n_groups > 1:
            selection_TE = limit_groups(selection_TE, self.n_groups, self.topk_groups)
        expert_TK = choose(selection_TE, self.top_k, context)
        gate_TK = score_TE.gather(-1, expert_TK)
        if renormalize:
            gate_TK = gate_TK / (gate_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return make_routing(
            expert_TK=expert_TK,
            gate_TK=gate_TK * self.scale,
            selection_TE=selection_TE,
            balance_TE=score_TE / score_TE.sum(dim=-1, keepdim=True),
            logit_TE=logit_TE,
            context=context,
        )


def limit_groups(selection_TE: Tensor, n_groups: int, topk_groups: int) -> Tensor:
    """-inf outside each token's best groups. Not 0: biased scores may be negative, and 0 would then win."""
    score_TGe = selection_TE.unflatten(-1, (n_groups, -1))
    group_TG = score_TGe.topk(min(2, score_TGe.shape[-1]), dim=-1).values.sum(dim=-1)
    keep_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(-1, top_k(group_TG, topk_groups), True)
    return score_TGe.masked_fill(~keep_TG[..., None], float("-inf")).flatten(-2)
