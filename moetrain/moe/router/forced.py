"""Routing that ignores the scores, for benchmarks: how fast is a step under a given load?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.moe.router.common import choose, make_routing, router_logits
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
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"router.distribution={distribution!r}: nearest legal value: balanced (or zipf)")
        self.top_k, self.distribution, self.exponent = top_k, distribution, exponent
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))

    def forward(
        self, x_TD: Tensor, context: TokenContext, bias_E: Tensor | None = None, carry: Tensor | None = None
    ) -> Routing:
        logit_TE = router_logits(x_TD, self.weight)
        prob_TE = logit_TE.softmax(dim=-1)
        selection_TE = forced_scores(context, logit_TE, self.top_k, self.distribution, self.exponent)
        expert_TK = choose(selection_TE, self.top_k, context)
        gate_TK = prob_TE.gather(-1, expert_TK)
        return make_routing(
            expert_TK=expert_TK,
            gate_TK=gate_TK / gate_TK.sum(dim=-1, keepdim=True),
            selection_TE=selection_TE,
            balance_TE=prob_TE,
            logit_TE=logit_TE,
            context=context,
        )


def forced_scores(context: TokenContext, like_TE: Tensor, k: int, distribution: str, exponent: float) -> Tensor:
    """Scores [T, E] whose k largest are the forced choice."""
    tokens, n_experts = like_TE.shape
    expert_E = torch.arange(n_experts, device=like_TE.device)
    if distribution == "balanced":
        first_T1 = torch.arange(tokens, device=like_TE.device)[:, None] * k
        return -((expert_E - first_T1) % n_experts).to(like_TE.dtype)  # the first of a run of k experts scores best
    seed_T1 = (context.token_BS.flatten() * 7919 + context.position_BS.flatten() * 104729)[:, None]
    mixed_TE = (seed_T1 + expert_E * 1299709) % 2147483647 * 2654435761 % 2147483647
    noise_TE = (mixed_TE.to(like_TE.dtype) + 0.5) / 2147483648  # in (0, 1)
    return -exponent * (expert_E + 1).log() - (-noise_TE.log()).log()
