"""Combine: each token sums its rows (gather, no atomics), optionally weighted; also collects the gate gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .plan import RowPlan


@triton.jit
def combine_kernel(y_ptr, row_S, gate_S, part_ptr, dgate_S, out_ptr, N: tl.constexpr, K: tl.constexpr,
                   PARTS: tl.constexpr, PARTS_POW2: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = sum_k (gate[t, k]) y[row[t, k]], in the order of k. With PARTS, also dgate[t, k] = sum(part[row])."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_S + token * K + k).to(tl.int64)
        used = row >= 0
        y = tl.load(y_ptr + row * N + cols, mask=used & (cols < N), other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(gate_S + token * K + k).to(tl.float32)
        total += tl.where(used, y, 0.0)
        if PARTS > 0 and tl.program_id(1) == 0:
            p = tl.arange(0, PARTS_POW2)
            part = tl.load(part_ptr + row * PARTS + p, mask=used & (p < PARTS), other=0.0)
            tl.store(dgate_S + token * K + k, tl.sum(part).to(dgate_S.dtype.element_ty))
    tl.store(out_ptr + token * N + cols, total.to(out_ptr.dtype.element_ty), mask=cols < N)


def combine(
    y_RN: torch.Tensor,
    plan: RowPlan,
    gate_TK: torch.Tensor | None = None,
    part_RP: torch.Tensor | None = None,
    dgate_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """`out_TN`; if `part_RP` is given, its row sums are also written to `dgate_TK` (0 for an unused slot)."""
    num_tokens, top_k = plan.row_TK.shape
    num_n = y_RN.shape[1]
    out_TN = y_RN.new_empty(num_tokens, num_n)
    block = next((b for b in (2048, 1024, 512) if num_n % b == 0), min(2048, triton.next_power_of_2(num_n)))
    parts = 0 if part_RP is None else part_RP.shape[1]
    combine_kernel[(num_tokens, triton.cdiv(num_n, block))](
        y_RN, plan.row_TK, gate_TK, part_RP, dgate_TK, out_TN, N=num_n, K=top_k, PARTS=parts,
        PARTS_POW2=triton.next_power_of_2(max(1, parts)), WEIGHTED=gate_TK is not None, BLOCK=block,
        num_warps=max(1, min(8, block // 256)))
    return out_TN
