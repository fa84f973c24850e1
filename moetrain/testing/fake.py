"""Inputs with the properties real ones have: uneven documents, padding, something different on every row."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.dispatch.base import Weights
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


def fake_tokens(
    tokens: int, d_model: int, n_experts: int, top_k: int, seed: int, *, unused: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_TD, expert_TK, gate_TK, dy_TD in fp64 on the CPU; x and gate ask for gradients.

    A token's experts differ; a share of `unused` slots is -1.
    """
    g = torch.Generator().manual_seed(seed)
    expert_TK = torch.rand(tokens, n_experts, generator=g).argsort(-1)[:, :top_k]
    expert_TK[torch.rand(tokens, top_k, generator=g) < unused] = -1
    x_TD = torch.randn(tokens, d_model, generator=g, dtype=torch.float64).requires_grad_()
    gate_TK = torch.rand(tokens, top_k, generator=g, dtype=torch.float64).requires_grad_()
    return x_TD, expert_TK, gate_TK, torch.randn(tokens, d_model, generator=g, dtype=torch.float64)


def fake_experts(n_experts: int, d_model: int, d_expert: int) -> Weights:
    """The weights of all experts in fp64 on the CPU, the same whoever asks."""
    g = torch.Generator().manual_seed(7)
    w_E2FD = torch.randn(n_experts, 2, d_expert, d_model, generator=g, dtype=torch.float64)
    return w_E2FD, torch.randn(n_experts, d_model, d_expert, generator=g, dtype=torch.float64)


def own_experts(weights: Weights) -> Weights:
    """This rank's block of all experts' weights, as leaves that ask for gradients."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    w_E2FD, w_EDF = (w.chunk(ranks)[rank].clone().requires_grad_() for w in weights)
    return w_E2FD, w_EDF
