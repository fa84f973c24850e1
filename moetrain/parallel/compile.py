"""torch.compile for what talks to no other rank in a block: attention's projections, dense MLP, shared experts.

Attention itself stays outside the graphs: it is one fused kernel already, and under context parallelism it exchanges
keys. Routing, dispatch, and expert matmuls depend on how many tokens each expert received; compiling them anew for
each number of tokens would cost more than it gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moetrain.model.core import Mask, RowAttention
from moetrain.model.decoder import Decoder
from moetrain.moe.layer import MoELayer

BACKEND = "inductor"


def apply_compile(model: Decoder, compiled: bool) -> None:
    """Compile when first run. Names and hooks of modules stay as they are; call it before apply_recompute."""
    if not compiled:
        return
    model.row_attention = OutsideGraphs(model.row_attention)
    for block in model.layers.values():
        shared = [layer.shared for layer in block.modules() if isinstance(layer, MoELayer)]
        for part in (block.attention, getattr(block, "mlp", None), *shared):
            if part is not None:
                assert isinstance(part, nn.Module)
                part.forward = torch.compile(part.forward, backend=BACKEND)


class OutsideGraphs(RowAttention):
    """Another RowAttention, which the compiler does not look into."""

    def __init__(self, inner: RowAttention) -> None:
        self.inner = inner
        self._attend: Any = torch.compiler.disable(inner.attend)

    def mask(self, document_BS: Tensor, dtype: torch.dtype, documents: bool) -> Mask:
        return self.inner.mask(document_BS, dtype, documents)

    def attend(self, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSe: Tensor, mask: Mask, scale: float) -> Tensor:
        return self._attend(q_BHSd, k_BGSd, v_BGSe, mask, scale)
