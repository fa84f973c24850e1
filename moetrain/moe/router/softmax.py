"""Softmax top-k routing, with the softmax before or after the choice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.moe.router.common import choose, make_routing, router_logits
from moetrain.moe.types import Routing, TokenContext


class SoftmaxTopK(nn.Module):
    """order="pre": p = softmax(z), choose by p, gates are p of the chosen ("OLMoE", Qwen; Switch for k=1).

    order="post": choose by z, gates are the softmax over the chosen logits ("Mixtral of Experts"), which equals
    pre with renormalize. A selection bias is added to p (pre) or z (post) for the choice only, never to a gate.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        order: str = "pre",
        renormalize: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if order not in ("pre", "post"):
            raise ValueError(f"router.order={order!r}: nearest legal value: pre (or post)")
        if top_k == 1 and (order == "post" or renormalize):
            raise ValueError(
                f"router.order={order}, router.renormalize={renormalize} with top_k=1 makes every gate exactly 1, so "
                "the router gets no gradient from the loss; nearest legal value: order=pre with renormalize=false"
            )
        self.top_k, self.order, self.renormalize, self.scale = top_k, order, renormalize, scale
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))

    def forward(
        self, x_TD: Tensor, context: TokenContext, bias_E: Tensor | None = None, carry: Tensor | None = None
    ) -> Routing:
        logit_TE = router_logits(x_TD, self.weight)
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
