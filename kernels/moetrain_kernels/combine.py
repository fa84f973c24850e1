"""Combine: each token sums its rows (gather, no atomics), optionally weighted; also collects the gate gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launcher, cdiv, power_of_2
from .plan import RowPlan

BLOCK_ELEMENTS = 4096


@triton.jit(do_not_specialize=["num_tokens", "more_tokens"])
def combine_kernel(
    y_ptr,
    row_S,
    gate_S,
    part_ptr,
    dgate_S,
    out_ptr,
    more_ptr,
    more_gate_ptr,
    num_tokens,
    more_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    K_POW2: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PARTS: tl.constexpr,
    MORE: tl.constexpr,
    MORE_GATES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] = sum_k (gate[t, k]) y[row[t, k]], in the order of k. With PARTS, also dgate[t, k] = sum(part[row]).

    To both, sums that were made elsewhere are added: [MORE, more_tokens, N] and [MORE_GATES, more_tokens, K].
    All stores stand behind all loads, because no load may be moved in front of a store.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at_slot = token[:, None] * K + tl.arange(0, K_POW2)[None, :]
    slots = inside[:, None] & (tl.arange(0, K_POW2) < K)[None, :]
    dgate = tl.zeros((TOKENS, K_POW2), tl.float32)
    if PARTS > 0 and tl.program_id(1) == 0:
        row = tl.load(row_S + at_slot, mask=slots, other=-1).to(tl.int64)
        for p in tl.static_range(PARTS):
            dgate += tl.load(part_ptr + row * PARTS + p, mask=row >= 0, other=0.0)
        for p in tl.static_range(MORE_GATES):
            at_more = more_gate_ptr + (p * more_tokens).to(tl.int64) * K + at_slot
            dgate += tl.load(at_more, mask=slots, other=0.0).to(tl.float32)
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_S + token * K + k, mask=inside, other=-1).to(tl.int64)
        used = row >= 0
        mask = used[:, None]
        if N % BLOCK != 0:
            mask = mask & (cols < N)[None, :]
        y = tl.load(y_ptr + row[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(gate_S + token * K + k, mask=used, other=0.0).to(tl.float32)[:, None]
        total += y
    mask = inside[:, None]
    if N % BLOCK != 0:
        mask = mask & (cols < N)[None, :]
    for p in tl.static_range(MORE):
        at_more = more_ptr + (p * more_tokens + token).to(tl.int64)[:, None] * N + cols[None, :]
        total += tl.load(at_more, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64)[:, None] * N + cols[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)
    if PARTS > 0 and tl.program_id(1) == 0:
        tl.store(dgate_S + at_slot, dgate.to(dgate_S.dtype.element_ty), mask=slots)


launch_combine = Launcher(combine_kernel)


def combine(
    y_RN: torch.Tensor,
    plan: RowPlan,
    gate_TK: torch.Tensor | None = None,
    part_RP: torch.Tensor | None = None,
    dgate_TK: torch.Tensor | None = None,
    out_TN: torch.Tensor | None = None,
    more: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """`out_TN`; if `part_RP` is given, its row sums are also brought into `dgate_TK` (0 for an unused slot).

    more: [P, at least T, N] and, with `part_RP`, [P, as many, K] or None, contiguous: added to both.
    """
    num_tokens, top_k = plan.row_TK.shape
    num_n = y_RN.shape[1]
    if out_TN is None:
        out_TN = y_RN.new_empty(num_tokens, num_n)
    block, tokens = _blocks(num_n)
    args = (y_RN, plan.row_TK, gate_TK, part_RP, dgate_TK, out_TN, *(more or (None, None)))
    args += (num_tokens, more[0].shape[1] if more else 0)
    constants = {
        "N": num_n,
        "K": top_k,
        "K_POW2": power_of_2(top_k),
        "WEIGHTED": gate_TK is not None,
        "PARTS": 0 if part_RP is None else part_RP.shape[1],
        "MORE": more[0].shape[0] if more else 0,
        "MORE_GATES": more[1].shape[0] if more and more[1] is not None else 0,
        "TOKENS": tokens,
        "BLOCK": block,
    }
    launch_combine((cdiv(num_tokens, tokens), cdiv(num_n, block), 1), args, constants, num_warps=8)
    return out_TN


def sum_rows(y_RN: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    """[T, N]: for each token the sum of its rows of `y_RN`, in the order of k, rounded once. row_TK: whole numbers, -1
    for none; both contiguous."""
    (num_tokens, top_k), num_n = row_TK.shape, y_RN.shape[1]
    out_TN = y_RN.new_zeros(num_tokens, num_n) if y_RN.numel() == 0 else y_RN.new_empty(num_tokens, num_n)
    if out_TN.numel() and y_RN.numel():
        block, tokens = _blocks(num_n)
        args = (y_RN, row_TK, None, None, None, out_TN, None, None, num_tokens, 0)
        constants = {"N": num_n, "K": top_k, "K_POW2": power_of_2(top_k), "WEIGHTED": False}
        constants |= {"PARTS": 0, "MORE": 0, "MORE_GATES": 0, "TOKENS": tokens, "BLOCK": block}
        launch_combine((cdiv(num_tokens, tokens), cdiv(num_n, block), 1), args, constants, num_warps=8)
    return out_TN


def _blocks(num_n: int) -> tuple[int, int]:
    """(columns, tokens) of a program."""
    block = next((b for b in (2048, 1024, 512) if num_n % b == 0), min(2048, power_of_2(num_n)))
    return block, max(1, BLOCK_ELEMENTS // block)
