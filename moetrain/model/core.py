"""Which token may look at which, and the one place that computes attention.

Shapes: B rows, S positions, H query heads, G key/value heads, d query/key width, e value width.

Three paths, chosen without asking the device: causal without a mask when rows hold one document; FlexAttention with a
block mask for packed documents on CUDA in half precision; SDPA with a boolean mask otherwise. A mask is made once a
forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from moetrain.config.model import AttentionConfig
from moetrain.model import rope
from moetrain.moe.types import TokenContext

T = TypeVar("T")
Gather = Callable[[Tensor], Tensor]
BLOCK = 128  # FlexAttention's tile edge


def whole(x: T) -> T:
    """The rows that are here are whole: the default of every seam at which they might not be."""
    return x


@dataclass(frozen=True)
class ForwardContext(TokenContext):
    """A TokenContext with what all layers of one forward share.

    mask: None is causal over the whole row; bool [B, 1, S, S], true where a query may look; or a BlockMask.
    cos_sin: rope.tables of the positions, fp32. FSDP looks inside dataclasses: with its cast_forward_inputs these and
    the token totals would be rounded to bf16, so that option has to stay off.
    """

    mask: Tensor | BlockMask | None = None
    cos_sin: tuple[Tensor, Tensor] = field(default=(torch.empty(0), torch.empty(0)))


def share(context: TokenContext, config: AttentionConfig, dtype: torch.dtype, documents: bool) -> ForwardContext:
    """Make mask and tables once. documents: attention stays inside a document, padding being a document of its own."""
    mask: Tensor | BlockMask | None = None
    if documents:
        blocks = _flex_can(context.document_BS, dtype)
        mask = block_mask(context.document_BS) if blocks else document_mask(context.document_BS)
    cos_sin = rope.tables(config.rope, config.rope_dim, context.position_BS)
    known = {f.name: getattr(context, f.name) for f in fields(TokenContext)}
    return ForwardContext(**known, mask=mask, cos_sin=cos_sin)


def document_mask(document_BS: Tensor) -> Tensor:
    """bool [B, 1, S, S]: causal and inside one document. Padding sees itself: no softmax runs over nothing."""
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    return same_BSS.tril()[:, None]


def block_mask(document_BS: Tensor) -> BlockMask:
    """The same rule for FlexAttention, from the range of ids of each tile instead of all S x S pairs.

    Tiles whose ranges overlap are computed with the rule applied to each element; tiles below the diagonal that hold
    one and the same document are computed without it. S must be a multiple of BLOCK.
    """
    rows, length = document_BS.shape
    tile_BNb = document_BS.view(rows, length // BLOCK, BLOCK)
    low_BN, high_BN = tile_BNb.amin(-1), tile_BNb.amax(-1)
    index_N = torch.arange(length // BLOCK, device=document_BS.device)
    overlap = (low_BN[:, :, None] <= high_BN[:, None, :]) & (low_BN[:, None, :] <= high_BN[:, :, None])
    needed = overlap & (index_N[:, None] >= index_N)
    one = low_BN == high_BN
    full = needed & one[:, :, None] & one[:, None, :] & (index_N[:, None] > index_N)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document_BS[b, q] == document_BS[b, k])

    return BlockMask.from_kv_blocks(
        *_tile_list(needed & ~full), *_tile_list(full), BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=(length, length)
    )


def _tile_list(chosen_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many key tiles each query tile has, and their indices, the chosen first: int32 [B, 1, N] and [B, 1, N, N]."""
    order = chosen_BNN.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen_BNN.sum(-1)[:, None].int(), order[:, None].int()


def attend(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSe: Tensor, context: ForwardContext, scale: float) -> Tensor:
    """softmax(scale * q k^T) v under the context's mask -> [B, H, S, e]. H is a multiple of G."""
    groups = q_BHSd.shape[1] // k_BGSd.shape[1]
    if isinstance(context.mask, BlockMask):
        return _flex()(q_BHSd, k_BGSd, v_BGSe, block_mask=context.mask, scale=scale, enable_gqa=groups > 1)
    if groups > 1:
        # Repeating costs a copy of k and v; SDPA's enable_gqa would leave only its slow kernel once there is a mask.
        k_BGSd, v_BGSe = k_BGSd.repeat_interleave(groups, dim=1), v_BGSe.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        q_BHSd, k_BGSd, v_BGSe, attn_mask=context.mask, is_causal=context.mask is None, scale=scale
    )


def _flex_can(document_BS: Tensor, dtype: torch.dtype) -> bool:
    half = dtype in (torch.bfloat16, torch.float16)
    return document_BS.is_cuda and half and document_BS.shape[1] % BLOCK == 0


@functools.cache
def _flex() -> Callable[..., Any]:
    """Compiled once a process: uncompiled it holds all S x S scores. New shapes compile again, new documents not."""
    return torch.compile(flex_attention, dynamic=False)
