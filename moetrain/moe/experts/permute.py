"""Sort (token, slot) pairs by expert and back, with gradients that need no atomics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sort_by_expert(expert_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order of the flattened (token, slot) pairs by expert, unused slots last.

    Returns order_N (pair at each sorted position), place_N (its inverse: sorted position of each pair), and offset_E
    (int32: where each expert's rows end). Stable, hence deterministic; no host synchronisation.
    """
    key_N = torch.where(expert_TK >= 0, expert_TK, n_experts).flatten()
    sorted_N, order_N = key_N.sort(stable=True)
    place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.numel(), device=order_N.device))
    experts = torch.arange(n_experts, device=key_N.device)
    offset_E = torch.searchsorted(sorted_N, experts, right=True).to(torch.int32)
    return order_N, place_N, offset_E


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, place_N: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(place_N)
        ctx.slots = slots
        return x_TD[order_N // slots]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (place_N,) = ctx.saved_tensors
        return grads[0][place_N].view(-1, ctx.slots, grads[0].shape[-1]).sum(1), None, None, None


def gather_rows(x_TD: Tensor, order_N: Tensor, place_N: Tensor, slots: int) -> Tensor:
    """Token rows in expert order [N, D], N = T * slots. Its gradient gathers and sums, where indexing would scatter."""
    return _GatherRows.apply(x_TD, order_N, place_N, slots)


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return x[index_N]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return grads[0][inverse_N], None, None


def reorder(x: Tensor, index_N: Tensor, inverse_N: Tensor) -> Tensor:
    """x[index_N] for a permutation, whose gradient is the inverse permutation."""
    return _Reorder.apply(x, index_N, inverse_N)
