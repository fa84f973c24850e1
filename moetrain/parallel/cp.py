"""Context parallelism: the ranks of a cp group read the same rows, and each keeps 1/cp of every row's positions.

A row is cut into 2 cp chunks, of which rank i keeps chunks i and 2 cp - 1 - i: under a causal mask an early and a late
chunk together cost the same on every rank. Everything but attention looks at one token at a time, so only attention
and the balance losses of whole rows know of the cut. Three ways for a query to meet keys of other ranks:

    allgather   keys and values of the whole row on every rank, their gradients summed back
    ring        they travel from rank to rank; memory for one more share only (parallel/ring.py)
    ulysses     an all-to-all gives each rank whole rows of 1/cp of the heads, another takes the result back
                (arXiv:2309.14509)

"Rank order" below is the order of a gather over the group: chunks 0, 2 cp - 1, 1, 2 cp - 2, ...
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.collectives import all_to_all_rows
from moetrain.comm.shards import gather_shards
from moetrain.mesh.build import Meshes
from moetrain.model.core import Mask, RowAttention, make_mask, masked_attention
from moetrain.model.decoder import Decoder
from moetrain.parallel.ring import ring_attention


def apply_cp(model: Decoder, meshes: Meshes, method: str) -> None:
    """Give the model attention over rows that are cut."""
    if meshes.layout.cp > 1:
        model.row_attention = METHODS[method](meshes.cp.get_group())


def chunks_of(cp: int, rank: int) -> tuple[int, int]:
    """The early and the late chunk that a rank keeps."""
    return rank, 2 * cp - 1 - rank


def held_places(seq_len: int, cp: int, rank: int, device: torch.device | None = None) -> Tensor:
    """int64 [seq_len / cp]: which places of a row a rank keeps, ascending. cp = 1 keeps all, of any number."""
    place_S = torch.arange(seq_len, device=device)
    if cp == 1:
        return place_S
    chunks = place_S.chunk(2 * cp)
    return torch.cat([chunks[c] for c in chunks_of(cp, rank)])


def to_row_order(x: Tensor, dim: int, cp: int) -> Tensor:
    """From rank order to the row's along `dim`."""
    chunks, order = x.chunk(2 * cp, dim), _rank_order(cp)
    return torch.cat([chunks[order.index(c)] for c in range(2 * cp)], dim)


def to_rank_order(x: Tensor, dim: int, cp: int) -> Tensor:
    """The inverse of `to_row_order`."""
    chunks = x.chunk(2 * cp, dim)
    return torch.cat([chunks[c] for c in _rank_order(cp)], dim)


def _rank_order(cp: int) -> list[int]:
    return [chunk for rank in range(cp) for chunk in chunks_of(cp, rank)]


class GatheredAttention(RowAttention):
    """method allgather. group: the ranks that share rows."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.cp, self.rank = group, group.size(), group.rank()

    def mask(self, document_BS: Tensor, dtype: torch.dtype, documents: bool) -> Mask:
        row_BS = self.whole_documents(document_BS, documents)
        return make_mask(row_BS, dtype, held_places(row_BS.shape[1], self.cp, self.rank, row_BS.device))

    def attend(self, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSe: Tensor, mask: Mask, scale: float) -> Tensor:
        kv = gather_shards(torch.cat([k_BGSd, v_BGSe], dim=-1), 2, self.group)
        k, v = to_row_order(kv, 2, self.cp).split([k_BGSd.shape[-1], v_BGSe.shape[-1]], dim=-1)
        return masked_attention(q_BHSd, k, v, mask, scale)

    def whole_documents(self, document_BS: Tensor, documents: bool) -> Tensor:
        """int32 [B, S * cp], documents of the whole rows in their order; one a row where documents do not count."""
        if not documents:
            return document_BS.new_zeros(document_BS.shape[0], document_BS.shape[1] * self.cp)
        return to_row_order(gather_shards(document_BS, 1, self.group), 1, self.cp)


class RingAttention(GatheredAttention):
    """method ring. Its mask is the documents of the whole rows: each meeting of two chunks makes its own part."""

    def mask(self, document_BS: Tensor, dtype: torch.dtype, documents: bool) -> Mask:
        return self.whole_documents(document_BS, documents) if documents else None

    def attend(self, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSe: Tensor, mask: Mask, scale: float) -> Tensor:
        assert mask is None or isinstance(mask, Tensor)
        return ring_attention(q_BHSd, k_BGSd, v_BGSe, mask, scale, self.group)


class UlyssesAttention(GatheredAttention):
    """method ulysses. Key/value heads fewer than ranks are repeated as often as it takes."""

    def mask(self, document_BS: Tensor, dtype: torch.dtype, documents: bool) -> Mask:
        return make_mask(self.whole_documents(document_BS, documents), dtype) if documents else None

    def attend(self, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSe: Tensor, mask: Mask, scale: float) -> Tensor:
        kv = torch.cat([k_BGSd, v_BGSe], dim=-1)
        kv = kv.repeat_interleave(self.cp // math.gcd(kv.shape[1], self.cp), dim=1)
        k, v = self._own_heads(kv).split([k_BGSd.shape[-1], v_BGSe.shape[-1]], dim=-1)
        return self._own_places(masked_attention(self._own_heads(q_BHSd), k, v, mask, scale))

    def _own_heads(self, x_BHSd: Tensor) -> Tensor:
        """[B, H, S, d] of this rank's places -> [B, H / cp, S * cp, d], its heads of whole rows."""
        x_RhBSd = self._swap(x_BHSd.transpose(0, 1)).unflatten(0, (self.cp, -1))
        return to_row_order(x_RhBSd.permute(2, 1, 0, 3, 4).flatten(2, 3), 2, self.cp)

    def _own_places(self, y_BhSe: Tensor) -> Tensor:
        """The inverse of `_own_heads`."""
        y_BhRSe = to_rank_order(y_BhSe, 2, self.cp).unflatten(2, (self.cp, -1))
        return self._swap(y_BhRSe.permute(2, 1, 0, 3, 4).flatten(0, 1)).transpose(0, 1)

    def _swap(self, x: Tensor) -> Tensor:
        """Equal blocks of rows, the r-th to rank r."""
        assert x.shape[0] % self.cp == 0, f"{x.shape[0]} heads over {self.cp} ranks"
        share = [x.shape[0] // self.cp] * self.cp
        return all_to_all_rows(x, share, share, self.group)


METHODS = {"allgather": GatheredAttention, "ring": RingAttention, "ulysses": UlyssesAttention}
