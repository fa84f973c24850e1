"""Attention over rows cut between ranks against attention over whole rows, in fp64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from moetrain.comm import shards
from moetrain.config.model import AttentionConfig
from moetrain.model.core import WHOLE_ROWS, attend, share
from moetrain.moe.types import TokenContext, Totals
from moetrain.parallel import cp, ring
from moetrain.testing import run_ranks

pytestmark = pytest.mark.distributed
LENGTH, BAR = 48, 1e-12
HEADS = {  # query heads, key heads, key width, value width
    "gqa": (8, 4, 6, 6),
    "gqa with fewer key heads than ranks": (4, 1, 6, 6),
    "key heads that ranks do not divide": (12, 6, 4, 4),
    "mla": (4, 4, 10, 6),
}


def document_rows():
    """One document; boundaries on and beside chunks'; many; one token each; padding behind, and only padding."""
    rows = torch.zeros(6, LENGTH, dtype=torch.int32)
    rows[1, 12:] += 1
    rows[1, 25:] += 1
    rows[1, 35:] += 1
    rows[2] = torch.arange(LENGTH) // 3
    rows[3] = torch.arange(LENGTH)
    rows[4, 5:] = 1
    rows[4, 29:] = -1
    rows[5] = -1
    return rows


def attention(rows, heads, documents, place_S, dtype=torch.float64):
    """Output and input gradients for the places given; the inputs depend on the place in the row, not on the rank."""
    n_heads, n_kv_heads, width, v_width = heads
    torch.manual_seed(1)
    document_BS = document_rows()
    shapes = [(n_heads, width), (n_kv_heads, width), (n_kv_heads, v_width), (n_heads, v_width)]
    whole = [torch.randn(len(document_BS), h, LENGTH, d, dtype=torch.float64).to(dtype) for h, d in shapes]
    *inputs, grad = [t[:, :, place_S].clone() for t in whole]
    for t in inputs:
        t.requires_grad_()
    n = torch.tensor(1.0)
    mine = document_BS[:, place_S]
    context = TokenContext(mine, mine.long(), mine, Totals(n, n, 1, 1))
    shared = share(context, AttentionConfig(), dtype, documents, rows)
    y = attend(*inputs, shared, 0.4)
    y.backward(grad)
    return [y.detach(), *(t.grad for t in inputs)]


def error(method, heads, documents, dtype=torch.float64):
    """This rank's largest deviation from whole rows."""
    group = torch.distributed.group.WORLD
    place_S = cp.held_places(LENGTH, group.size(), group.rank())
    mine = attention(cp.METHODS[method](group), heads, documents, place_S, dtype)
    whole = attention(WHOLE_ROWS, heads, documents, torch.arange(LENGTH))
    return max(float((a - b[:, :, place_S]).abs().max()) for a, b in zip(mine, whole))


def all_errors(methods, head_names, dtype=torch.float64):
    return {
        (method, name, documents): error(method, HEADS[name], documents, dtype)
        for method in methods
        for name in head_names
        for documents in (True, False)
    }


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_method_equals_whole_rows(world):
    head_names = [name for name in HEADS if HEADS[name][0] % world == 0]
    assert len(head_names) >= 1
    for errors in run_ranks(all_errors, world, ["allgather", "ring", "ulysses"], head_names):
        assert len(errors) == 6 * len(head_names)
        assert max(errors.values()) < BAR, errors


def test_the_ring_in_bf16_rounds_weights_and_results_once():
    """Values and gradients here are below 5, sums of weights 1, and bf16 keeps 8 bits: a few roundings of 5 * 2^-9."""
    for errors in run_ranks(all_errors, 2, ["ring"], ["gqa", "mla"], torch.bfloat16):
        assert max(errors.values()) < 8 * 5 * 2**-9, errors


FAULTS = {
    "places counted locally": "allgather",
    "chunks out of order": "allgather",
    "gathered gradients not summed": "allgather",
    "heads come back from the wrong rank": "ulysses",
    "late chunk taken for the early one": "ring",
    "a meeting left out": "ring",
    "gradients stop a rank short of home": "ring",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    pairs = ring.Ring.pairs
    if fault == "places counted locally":
        local = with_places(lambda length, size, *_: torch.arange(length // size), cp.GatheredAttention.mask)
        monkeypatch.setattr(cp.GatheredAttention, "mask", local)
    elif fault == "chunks out of order":
        monkeypatch.setattr(cp, "to_row_order", lambda x, dim, size: x)
    elif fault == "gathered gradients not summed":
        monkeypatch.setattr(shards, "_sum_scatter", lambda x, dim, group: x.chunk(group.size(), dim)[group.rank()])
    elif fault == "heads come back from the wrong rank":
        monkeypatch.setattr(cp.UlyssesAttention, "_own_places", swapped(cp.UlyssesAttention._own_places))
    elif fault == "late chunk taken for the early one":
        monkeypatch.setattr(ring.Ring, "chunk", lambda self, rank, late: rank)
    elif fault == "a meeting left out":
        monkeypatch.setattr(ring.Ring, "pairs", lambda self, source: pairs(self, source)[:2])
    else:
        monkeypatch.setattr(ring.Ring, "pass_on", lambda self, x: x)
    for errors in run_ranks(all_errors, 2, [FAULTS[fault]], ["gqa"]):
        assert max(errors.values()) > 1e-3, f"{fault} went unnoticed: {errors}"


def with_places(places, mask):
    def changed(self, *args):
        before, cp.held_places = cp.held_places, places
        try:
            return mask(self, *args)
        finally:
            cp.held_places = before

    return changed


def swapped(own_places):
    return lambda self, y: own_places(self, y).roll(1, dims=1)
