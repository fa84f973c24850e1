"""Which places of a row a cp rank keeps, and masks of queries that stand anywhere in it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from moetrain.model import core
from moetrain.model.core import BLOCK, block_mask, document_mask, masked_attention
from moetrain.parallel.cp import held_places, to_rank_order, to_row_order

pytestmark = pytest.mark.unit


def test_places_of_two_ranks_by_hand():
    assert held_places(12, 2, 0).tolist() == [0, 1, 2, 9, 10, 11]
    assert held_places(12, 2, 1).tolist() == [3, 4, 5, 6, 7, 8]
    assert held_places(5, 1, 0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_ranks_keep_every_place_once_and_see_equally_many(cp):
    length = 6 * cp
    places = [held_places(length, cp, rank) for rank in range(cp)]
    assert torch.cat(places).sort().values.tolist() == list(range(length))
    assert len({int((place + 1).sum()) for place in places}) == 1, "causal work differs between ranks"
    gathered = torch.cat(places)
    assert to_row_order(gathered, 0, cp).tolist() == list(range(length))
    assert torch.equal(to_rank_order(torch.arange(length), 0, cp), gathered)


def rows_of_tiles():
    document_BS = torch.zeros(3, 8 * BLOCK, dtype=torch.int32)
    document_BS[0, 100:] = 1
    document_BS[0, 130:] = 2
    document_BS[1, 5 * BLOCK :] = 1
    document_BS[2, 700:] = -1
    return document_BS


@pytest.mark.parametrize(("cp", "rank"), [(2, 0), (2, 1), (4, 1), (8, 3)])
def test_tiles_hold_the_mask_wherever_the_queries_stand(cp, rank):
    """Each pair the mask allows is in a listed tile; a tile listed as full allows all its pairs. In the last case a
    tile of queries spans two chunks."""
    document_BS, place_Q = rows_of_tiles(), held_places(8 * BLOCK, cp, rank)
    mask_BQS = document_mask(document_BS, place_Q)[:, 0]
    assert torch.equal(mask_BQS, document_mask(document_BS)[:, 0, place_Q])
    blocks = block_mask(document_BS, place_Q)
    tiles = mask_BQS.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3)
    some, every = tiles.any(-1).any(-1), tiles.all(-1).all(-1)
    partial = listed(blocks.kv_num_blocks, blocks.kv_indices)
    full = listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not (partial & full).any()
    assert torch.equal(full, every)
    assert not (some & ~full & ~partial).any()
    q, k = torch.meshgrid(torch.arange(len(place_Q)), torch.arange(8 * BLOCK), indexing="ij")
    for row in range(3):
        assert torch.equal(blocks.mask_mod(torch.tensor(row), torch.tensor(0), q, k), mask_BQS[row])


def listed(count_B1M, index_B1MN):
    """bool [B, M, N]: the tiles that a list names."""
    n = index_B1MN.shape[-1]
    chosen = torch.arange(n) < count_B1M[..., None]
    return torch.zeros(index_B1MN.shape, dtype=torch.bool).scatter(3, index_B1MN.long(), chosen)[:, 0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_takes_the_tiles(monkeypatch):
    monkeypatch.setattr(core, "_flex", lambda: flex_attention)  # uncompiled: the CPU has no kernel for it
    torch.manual_seed(0)
    document_BS, place_Q = rows_of_tiles(), held_places(8 * BLOCK, 4, 1)
    q, k, v = torch.randn(3, 4, len(place_Q), 8), torch.randn(3, 2, 8 * BLOCK, 8), torch.randn(3, 2, 8 * BLOCK, 8)
    tiled = masked_attention(q, k, v, block_mask(document_BS, place_Q), 0.3)
    masked = masked_attention(q, k, v, document_mask(document_BS, place_Q), 0.3)
    torch.testing.assert_close(tiled, masked, rtol=0, atol=1e-5)
