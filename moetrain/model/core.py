"""Which token may look at which, and the one place that computes attention.

Shapes: B rows, S positions, H query heads, G key/value heads, d query/key width, e value width.

Three paths, chosen without asking the device: causal without a mask when rows hold one document; FlexAttention with a
block mask for packed documents on CUDA in half precision; SDPA with a boolean mask otherwise. A mask is made once a
forward. `RowAttention` is the seam for rows that are cut between ranks: everything else in a model looks at one token.
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
HALF = (torch.bfloat16, torch.float16)
Mask = Tensor | BlockMask | None


class RowAttention:
    """Attention where this process holds whole rows. parallel/cp.py overrides both methods where it holds parts."""

    def mask(self, document_BS: Tensor, dtype: torch.dtype, documents: bool) -> Mask:
        """What `attend` takes as mask, made once a forward from the documents of the tokens that are here."""
        return make_mask(document_BS, dtype) if documents else None

    def attend(self, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSe: Tensor, mask: Mask, scale: float) -> Tensor:
        """[B, H, S, e] for the tokens that are here."""
        return masked_attention(q_BHSd, k_BGSd, v_BGSe, mask, scale)


WHOLE_ROWS = RowAttention()


def whole(x: T) -> T:
    """The rows that are here are whole: the default of every seam at which they might not be."""
    return x


@dataclass(frozen=True)
class ForwardContext(TokenContext):
    """A TokenContext with what all layers of one forward share.

    mask: None is causal over the whole row; bool [B, 1, S, S], true where a query may look; or a BlockMask. Where rows
    are cut between ranks, whatever `attention` made for itself.
    cos_sin: rope.tables of the positions, fp32. FSDP looks inside dataclasses: with its cast_forward_inputs these and
    the token totals would be rounded to bf16, so that option has to stay off.
    """

    attention: RowAttention = WHOLE_ROWS
    mask: Mask = None
    cos_sin: tuple[Tensor, Tensor] = field(default=(torch.empty(0), torch.empty(0)))


def share(
    context: TokenContext,
    config: AttentionConfig,
    dtype: torch.dtype,
    documents: bool,
    attention: RowAttention = WHOLE_ROWS,
) -> ForwardContext:
    """Make mask and tables once. documents: attention stays inside a document, padding being a document of its own."""
    mask = attention.mask(context.document_BS, dtype, documents)
    cos_sin = rope.tables(config.rope, config.rope_dim, context.position_BS)
    known = {f.name: getattr(context, f.name) for f in fields(TokenContext)}
    return ForwardContext(**known, attention=attention, mask=mask, cos_sin=cos_sin)


def make_mask(document_BS: Tensor, dtype: torch.dtype, place_Q: Tensor | None = None) -> Tensor | BlockMask:
    """The rule of `document_mask`, in the form for this device and dtype."""
    tiles = place_Q is None or place_Q.shape[0] % BLOCK == 0
    return (block_mask if tiles and _flex_can(document_BS, dtype) else document_mask)(document_BS, place_Q)


def document_mask(document_BS: Tensor, place_Q: Tensor | None = None) -> Tensor:
    """bool [B, 1, Q, S]: causal and inside one document. Padding sees itself: no softmax runs over nothing.

    document_BS: of whole rows, the keys. place_Q: where in the row the queries stand, ascending; None is everywhere.
    """
    if place_Q is None:
        same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
        return same_BSS.tril()[:, None]
    place_S = torch.arange(document_BS.shape[1], device=document_BS.device)
    same_BQS = document_BS[:, place_Q, None] == document_BS[:, None, :]
    return (same_BQS & (place_Q[:, None] >= place_S))[:, None]


def block_mask(document_BS: Tensor, place_Q: Tensor | None = None) -> BlockMask:
    """The same rule for FlexAttention, from the range of ids of each tile instead of all Q x S pairs.

    Tiles whose ranges overlap are computed with the rule applied to each element; tiles below the diagonal that hold
    one and the same document are computed without it. Q and S must be multiples of BLOCK.
    """
    document_BQ = document_BS if place_Q is None else document_BS[:, place_Q]
    place_S = torch.arange(document_BS.shape[1], device=document_BS.device)
    low_BM, high_BM = _tile_range(document_BQ)
    low_BN, high_BN = _tile_range(document_BS)
    first_M, last_M = _tile_range(place_S if place_Q is None else place_Q)
    first_N, last_N = _tile_range(place_S)
    overlap = (low_BM[:, :, None] <= high_BN[:, None, :]) & (low_BN[:, None, :] <= high_BM[:, :, None])
    needed = overlap & (last_M[:, None] >= first_N)
    one_BMN = (low_BM == high_BM)[:, :, None] & (low_BN == high_BN)[:, None, :]
    full = needed & one_BMN & (first_M[:, None] > last_N)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        place = q if place_Q is None else place_Q[q]
        return (place >= k) & (document_BQ[b, q] == document_BS[b, k])

    lengths = (document_BQ.shape[1], document_BS.shape[1])
    return BlockMask.from_kv_blocks(
        *_tile_list(needed & ~full), *_tile_list(full), BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=lengths
    )


def _tile_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each tile: [..., S] -> two of [..., S / BLOCK]."""
    tiles = x.unflatten(-1, (-1, BLOCK))
    return tiles.amin(-1), tiles.amax(-1)


def _tile_list(chosen_BMN: Tensor) -> tuple[Tensor, Tensor]:
    """How many key tiles each query tile has, and their indices, the chosen first: int32 [B, 1, M] and [B, 1, M, N]."""
    order = chosen_BMN.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen_BMN.sum(-1)[:, None].int(), order[:, None].int()


def attend(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSe: Tensor, context: ForwardContext, scale: float) -> Tensor:
    """softmax(scale * q k^T) v under the context's mask -> [B, H, S, e]. H is a multiple of G."""
    return context.attention.attend(q_BHSd, k_BGSd, v_BGSe, context.mask, scale)


def masked_attention(q_BHQd: Tensor, k_BGSd: Tensor, v_BGSe: Tensor, mask: Mask, scale: float) -> Tensor:
    """The same for one mask, of the queries at hand over all keys. mask None is causal, with as many of both."""
    groups = q_BHQd.shape[1] // k_BGSd.shape[1]
    if isinstance(mask, BlockMask):
        return _flex()(q_BHQd, k_BGSd, v_BGSe, block_mask=mask, scale=scale, enable_gqa=groups > 1)
    # Of SDPA's fast kernels only flash attention shares k and v between heads, and it takes no mask. For the others
    # they are repeated: that costs a copy, the kernel that would be left without it all S x S scores.
    shared = mask is None and groups > 1 and q_BHQd.is_cuda and q_BHQd.dtype in HALF
    if groups > 1 and not shared:
        k_BGSd, v_BGSe = k_BGSd.repeat_interleave(groups, dim=1), v_BGSe.repeat_interleave(groups, dim=1)
    causal = mask is None
    return F.scaled_dot_product_attention(
        q_BHQd, k_BGSd, v_BGSe, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=shared
    )


def _flex_can(document_BS: Tensor, dtype: torch.dtype) -> bool:
    return document_BS.is_cuda and dtype in HALF and document_BS.shape[1] % BLOCK == 0


@functools.cache
def _flex() -> Callable[..., Any]:
    """Compiled once a process: uncompiled it holds all S x S scores. New shapes compile again, new documents not."""
    return torch.compile(flex_attention, dynamic=False)
