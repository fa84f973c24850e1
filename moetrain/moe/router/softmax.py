"""Softmax top-k routing, with the softmax before or after the choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.config.values import require_above_0
from moetrain.moe.router.common import check_kernels, choose, make_routing, router_logits
from moetrain.moe.router.fused import fused_routing, usable
from moetrain.moe.router.rounding import build_rounding
from moetrain.moe.types import Routing, TokenContext


class SoftmaxTopK(nn.Module):
    """order="pre": p = softmax(z), choose by p, gates are p of the chosen ("OLMoE", Qwen; Switch for k=1).

    order="post": choose by z, gates are the softmax over the chosen logits ("Mixtral of Experts"), which equals
    pre with renormalize. A selection bias is added to p (pre) or z (post) for the choice only, never to a gate.
    rounding: {tile, mode} of router/rounding.py. kernels: torch | triton | auto (triton where it can run).
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        order: str = "pre",
        renormalize: bool = True,
        scale: float = 1.0,
        rounding: Mapping[str, Any] | None = None,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        require_above_0("scale", scale, 1.0)
        if order not in ("pre", "post"):
            raise ValueError(f"router.order={order!r}: nearest legal value: pre (or post)")
        if top_k == 1 and (order == "post" or renormalize):
            raise ValueError(
                f"router.order={order}, router.renormalize={renormalize} with top_k=1 makes every gate exactly 1, so "
                "the router gets no gradient from the loss; nearest legal value: order=pre with renormalize=false"
            )
        self.top_k, self.order, self.renormalize, self.scale = top_k, order, renormalize, scale
        self.rounding, self.kernels = build_rounding(rounding, scale), check_kernels(kernels)
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))

    def forward(
        self, x_TD: Tensor, context: TokenContext, bias_E: Tensor | None = None, carry: Tensor | None = None
    ) -> Routing:
        logit_TE = router_logits(x_TD, self.weight)
        if self.rounding is None:
            return self._top_k(logit_TE, context, bias_E)
        routing = self._top_k(logit_TE, self.rounding.own_choice(context, self.top_k), bias_E)
        return self.rounding(routing, routing.balance_TE, context)

    def _top_k(self, logit_TE: Tensor, context: TokenContext, bias_E: Tensor | None) -> Routing:
        if usable(self.kernels, logit_TE):
            renormalize = self.renormalize or self.order == "post"
            rule = {"score": "softmax", "by_logit": self.order == "post", "renormalize": renormalize}
            return fused_routing(logit_TE, self.top_k, context, bias_E, scale=self.scale, **rule)
        prob_TE = logit_TE.softmax(dim=-1)
        selection_TE = prob_TE if self.order == "pre" else logit_TE
        if bias_E is not None:
            selection_TE = selection_TE + bias_E
        expert_TK = choose(selection_TE, self.top_k, context)
        if self.order == "post":
            gate_TK = logit_TE.gather(-1, expert_TK).softmax(dim=-1)
        else:
            gate_TK = prob_TE.gather(-1, expert_TK)
            if self.renormalize:
                gate_TK = gate_TK / gate_TK.sum(dim=-1, keepdim=True)
        return make_routing(
            expert_TK=expert_TK,
            gate_TK=gate_TK * self.scale,
            selection_TE=selection_TE,
            balance_TE=prob_TE,
            logit_TE=logit_TE,
            context=context,
        )
