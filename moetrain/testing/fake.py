"""Inputs with the properties real ones have: uneven documents, padding, something different on every row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.moe.types import Routing, TokenContext, Totals


def fake_context(rows: int, length: int, *, padding: int = 0, seed: int = 0, vocab: int = 100) -> TokenContext:
    """`rows` x `length` tokens in two documents a row; the last `padding` tokens of a row are padding.

    Its totals describe these rows alone, as if this were the whole global batch.
    """
    generator = torch.Generator().manual_seed(seed)
    token_BS = torch.randint(vocab, (rows, length), generator=generator)
    document_BS = (torch.arange(length) >= length // 3).int().repeat(rows, 1)
    if padding:
        document_BS[:, -padding:] = -1
    position_BS = torch.arange(length).repeat(rows, 1)
    tokens = (document_BS >= 0).sum().double()
    totals = Totals(loss_tokens=tokens, tokens=tokens, rows=rows, micro_batches=1)
    return TokenContext(token_BS, position_BS, document_BS, totals)


def fake_routing(expert_TK: Tensor, gate_TK: Tensor, **more: Any) -> Routing:
    """What a dispatcher reads of a routing, and `more` of it; what only balance losses read is empty."""
    empty = torch.empty(0)
    context = fake_context(1, max(len(expert_TK), 1))
    return Routing(expert_TK, gate_TK, empty, empty, empty, empty, context, **more)
