"""One decoder layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from moetrain.config.model import ModelConfig
from moetrain.model.attention import build_attention
from moetrain.model.core import ForwardContext, whole
from moetrain.model.mlp import SwiGLU
from moetrain.model.norm import RMSNorm
from moetrain.moe.types import TokenContext

BuildMoE = Callable[[int], nn.Module]


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm feed-forward: `mlp` (dense) or `moe`, of which the other does not exist.

    own_tokens: the context of the tokens in x_BSD, when those are a stretch of the rows (parallel/tp.py sets it).
    carry: what the previous MoE layer left for routers to look at; None before the first. Dense layers hand it on.
    """

    def __init__(self, config: ModelConfig, layer: int, build_moe: BuildMoE) -> None:
        super().__init__()
        self.own_tokens: Callable[[TokenContext], TokenContext] = whole
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = build_attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.is_moe = config.is_moe(layer)
        if self.is_moe:
            self.moe = build_moe(layer)
        else:
            self.mlp = SwiGLU(config.d_model, config.d_ff)

    def forward(self, x_BSD: Tensor, context: ForwardContext, carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x_BSD, h_BSD = self.ffn_norm.add(x_BSD, self.attention(self.attention_norm(x_BSD), context))
        if not self.is_moe:
            return x_BSD + self.mlp(h_BSD), carry
        y_BSD, carry = self.moe(h_BSD, self.own_tokens(context), carry)
        return x_BSD + y_BSD, carry
