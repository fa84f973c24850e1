"""Routing that starts random and becomes the router's own ("Every FLOP Counts: Scaling a 300B Mixture-of-Experts LING
LLM without Premium GPUs", stochastic routing warm-up).

After upcycling the experts are alike and the router knows nothing: whichever experts it happens to prefer would get all
tokens and learn first. While warming up, every expert gets its share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.router.common import router_logits
from moetrain.moe.router.softmax import SoftmaxTopK
from moetrain.moe.types import Routing, TokenContext

_MASK = (1 << 64) - 1


class WarmupSoftmaxTopK(SoftmaxTopK):
    """SoftmaxTopK over a z + (1 - a)(mean(z) + std(z) noise) with a = min(step / warmup_steps, 1).

    z: a token's logits, their mean and standard deviation taken over the experts, without gradient. noise: N(0, 1), a
    pure function of step, token id, position, and expert, so it is the same under every layout and when recomputed.
    From step warmup_steps on, and in evaluations, this is SoftmaxTopK. tied: so many neighbouring experts share their
    noise; the granularity of a virtual-group upcycling keeps its groups whole. Raises ValueError as SoftmaxTopK, and
    for a negative warmup_steps or a tied that does not divide the experts.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        order: str = "pre",
        renormalize: bool = True,
        scale: float = 1.0,
        warmup_steps: int = 100,
        tied: int = 1,
    ) -> None:
        super().__init__(d_model, n_experts, top_k, order, renormalize, scale)
        if warmup_steps < 0:
            raise ValueError(f"router.warmup_steps={warmup_steps}; nearest legal value: 0")
        if tied < 1 or n_experts % tied:
            raise ValueError(f"router.tied={tied} does not divide {n_experts} experts; nearest legal value: 1")
        self.warmup_steps, self.tied = warmup_steps, tied

    def forward(
        self, x_TD: Tensor, context: TokenContext, bias_E: Tensor | None = None, carry: Tensor | None = None
    ) -> Routing:
        if context.step >= self.warmup_steps or not torch.is_grad_enabled():
            return super().forward(x_TD, context, bias_E, carry)
        own = context.step / self.warmup_steps
        logit_TE = router_logits(x_TD, self.weight)
        spread_T1, mean_T1 = torch.std_mean(logit_TE.detach(), dim=-1, correction=0, keepdim=True)
        noise_TE = token_noise(context, logit_TE.shape[1] // self.tied).repeat_interleave(self.tied, dim=1)
        logit_TE = own * logit_TE + (1 - own) * (mean_T1 + spread_T1 * noise_TE.to(logit_TE.dtype))
        return self._top_k(logit_TE, context, bias_E)


def token_noise(context: TokenContext, n: int) -> Tensor:
    """N(0, 1) [T, n], fp64: from (step, token id, position, column) by integer hashing, without a generator's state."""
    token_T, position_T = context.token_BS.flatten().long(), context.position_BS.flatten().long()
    column_n = torch.arange(n, device=token_T.device)
    key_T = _mix(_mix(_mix(torch.full_like(token_T, context.step + 1)) + token_T) + position_T)
    bits_Tn = _shifted(_mix(key_T[:, None] + column_n + 1), 12)
    uniform_Tn = (bits_Tn.double() + 0.5) / (1 << 52)
    return torch.special.ndtri(uniform_Tn)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, on int64 that wraps around."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, n: int) -> Tensor:
    """x >> n with zeros coming in, as if x were unsigned."""
    return (x >> n) & (_MASK >> n)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
