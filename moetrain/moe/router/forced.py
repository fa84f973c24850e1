"""Routing that ignores the scores, for benchmarks: how fast is a step under a given load?"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from moetrain.config.values import require_range
from moetrain.moe.router.common import make_routing, router_logits
from moetrain.moe.router.fused import fused_routing, usable
from moetrain.moe.types import Routing, TokenContext

DISTRIBUTIONS = ("balanced", "zipf")


class ForcedRouter(nn.Module):
    """balanced: slot k of a rank's token t goes to expert (t K + k) mod E. zipf: K different experts, drawn as if
    expert e had the weight 1 / (e + 1)^exponent ("Gumbel top-k"), the same for a token id and position every time.

    Gates are the softmax's probabilities of the chosen experts, renormalised, so that all gradients flow as usual. The
    choice is of the tokens a rank happens to hold: not for training, and not the same under every layout.
    """

    def __init__(
        self, d_model: int, n_experts: int, top_k: int, distribution: str = "balanced", exponent: float = 0.6
    ) -> None:
        super().__init__()
        require_range("exponent", exponent, 0, math.inf)
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"router.distribution={distribution!r}: nearest legal value: balanced (or zipf)")
        self.top_k, self.distribution, self.exponent = top_k, distribution, exponent
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))

    def forward(
        self, x_TD: Tensor, context: TokenContext, bias_E: Tensor | None = None, carry: Tensor | None = None
    ) -> Routing:
        logit_TE = router_logits(x_TD, self.weight)
        expert_TK = forced_choice(context, logit_TE, self.top_k, self.distribution, self.exponent)
        if context.chosen_TK is not None:
            expert_TK = torch.where(context.chosen_TK >= 0, context.chosen_TK, expert_TK)
        if usable("auto", logit_TE):  # as a router that is not forced
            forced = replace(context, chosen_TK=expert_TK)
            routing = fused_routing(logit_TE, self.top_k, forced, None, score="softmax", renormalize=True)
            return replace(routing, context=context)
        prob_TE = logit_TE.softmax(dim=-1)
        gate_TK = prob_TE.gather(-1, expert_TK)
        return make_routing(
            expert_TK=expert_TK,
            gate_TK=gate_TK / gate_TK.sum(dim=-1, keepdim=True),
            selection_TE=prob_TE,
            balance_TE=prob_TE,
            logit_TE=logit_TE,
            context=context,
        )


def forced_choice(context: TokenContext, like_TE: Tensor, k: int, distribution: str, exponent: float) -> Tensor:
    """The forced experts [T, k] of tokens whose scores would look like `like_TE`."""
    tokens, n_experts = like_TE.shape
    if distribution == "balanced":
        return torch.arange(tokens * k, device=like_TE.device).view(tokens, k) % n_experts
    expert_E = torch.arange(n_experts, device=like_TE.device)
    seed_T1 = (context.token_BS.flatten() * 7919 + context.position_BS.flatten() * 104729)[:, None]
    mixed_TE = (seed_T1 + expert_E * 1299709) % 2147483647 * 2654435761 % 2147483647
    noise_TE = (mixed_TE.to(like_TE.dtype) + 0.5) / 2147483648  # in (0, 1)
    score_TE = -exponent * (expert_E + 1).log() - (-noise_TE.log()).log()
    return score_TE.topk(k).indices
