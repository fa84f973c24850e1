"""What Megatron-Core 0.16.1 lacks without TransformerEngine and the grouped_gemm package, and forced routing for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.model.core import masked_attention
from moetrain.moe.router.forced import forced_choice
from moetrain.moe.types import TokenContext


def complete() -> None:
    """Give Megatron's modules the names that they look for."""
    from megatron.core.transformer.moe import grouped_gemm_util, moe_utils

    adapter = SimpleNamespace(ops=SimpleNamespace(gmm=grouped_gemm))
    grouped_gemm_util.grouped_gemm, grouped_gemm_util.ops = adapter, adapter.ops
    moe_utils.te_general_gemm = None  # its router asks whether this is None; 0.16.1 leaves it undefined without TE


def grouped_gemm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """grouped_gemm.ops.gmm by torch: rows a [N, K], of which b [E, K, M]'s expert e multiplies batch_sizes[e]."""
    end_E = batch_sizes.cumsum(0).to(torch.int32).to(a.device, non_blocking=True)
    return F.grouped_mm(a, b.transpose(-2, -1) if trans_b else b, offs=end_E)


class CausalAttention(nn.Module):
    """Megatron's core attention by our call of SDPA: q [S, B, H, d], k and v [S, B, G, d] -> [S, B, H d]."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.scale = config.kv_channels**-0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return masked_attention(q, k, v, None, self.scale).permute(2, 0, 1, 3).flatten(2)


def force(model: Any, routing: str, k: int) -> None:
    """Replace every router's choice by the forced one, for the tokens and positions of this forward."""
    held: dict[str, TokenContext] = {}

    def remember(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        token_BS = args[0]
        position_BS = torch.arange(token_BS.shape[1], device=token_BS.device).expand_as(token_BS)
        held["context"] = TokenContext(token_BS, position_BS, torch.zeros_like(token_BS), None)  # type: ignore[arg-type]

    def routed(logit_SBE: Tensor, padding_mask: None = None) -> tuple[Tensor, Tensor]:
        columns, rows = logit_SBE.shape[:2]
        index_TK = forced_choice(held["context"], logit_SBE.transpose(0, 1).flatten(0, 1), k, routing, 0.6)
        index_TK = index_TK.view(rows, columns, k).transpose(0, 1).flatten(0, 1)  # Megatron's tokens: row after row
        logit_TE = logit_SBE.flatten(0, 1)
        gate_TK = logit_TE.gather(-1, index_TK).softmax(-1)
        gate_TE = torch.zeros_like(logit_TE).scatter(1, index_TK, gate_TK)
        return gate_TE, torch.zeros_like(logit_TE, dtype=torch.bool).scatter(1, index_TK, True)

    model.register_forward_pre_hook(remember, with_kwargs=True)
    for layer in model.decoder.layers:
        layer.mlp.router.routing = routed
