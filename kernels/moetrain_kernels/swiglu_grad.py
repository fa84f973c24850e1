"""Backward through SwiGLU and the gate weight: one pass over memory, row by row, from the pre-activation H."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launcher, cdiv, power_of_2
from .plan import RowPlan

TAIL_ROWS = 128  # at least the reduction block of the weight-gradient kernel


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_grad_kernel(
    b_ptr,
    h_ptr,
    dh_ptr,
    a_ptr,
    gate_S,
    slot_R,
    part_ptr,
    sizes_6,
    num_rows,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """dh, gate * act and part = <b, act> over one block of ROWS rows and BLOCK columns; a_ptr may be b_ptr.

    The TAIL rows past the last are zeroed where they exist: a weight gradient's last block reads them.
    """
    PARTS: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.load(sizes_6 + 1)
    if tl.program_id(0) * ROWS < total + TAIL:
        live = row < total
        slot = tl.load(slot_R + row, mask=live, other=0)
        gate = tl.load(gate_S + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        dtype: tl.constexpr = a_ptr.dtype.element_ty
        cols = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
        at = row.to(tl.int64)[:, None] * F + cols
        at_h = row.to(tl.int64)[:, None] * (2 * F) + cols
        load = live[:, None]
        store = ((row < total + TAIL) & (row < num_rows))[:, None]
        if F % BLOCK != 0:
            load = load & (cols < F)
            store = store & (cols < F)
        b = tl.load(b_ptr + at, mask=load, other=0.0).to(tl.float32)
        g = tl.load(h_ptr + at_h, mask=load, other=0.0).to(tl.float32)
        u = tl.load(h_ptr + at_h + F, mask=load, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        silu = g * s
        act = silu * u
        da = b * gate
        tl.store(part_ptr + row.to(tl.int64) * PARTS + tl.program_id(1), tl.sum(b * act, axis=1), mask=live)
        tl.store(dh_ptr + at_h, (da * u * (s + silu * (1.0 - s))).to(dtype), mask=store)
        tl.store(dh_ptr + at_h + F, (da * silu).to(dtype), mask=store)
        tl.store(a_ptr + at, (act * gate).to(dtype), mask=store)


launch_swiglu_grad = Launcher(swiglu_grad_kernel)


def swiglu_grad(
    b_RF: torch.Tensor,
    gate_TK: torch.Tensor,
    plan: RowPlan,
    h_R2F: torch.Tensor,
    dh_R2F: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From `b_RF` = dy @ W_down: `dh_R2F`, `gate * a_RF` (in b's memory), `part_RP` (fp32) with sum dgate."""
    rows, num_f = b_RF.shape
    block = next((b for b in (1024, 512, 256) if num_f % b == 0), min(1024, power_of_2(num_f)))
    elements = 2048 if block >= 512 else 1024  # 8 a thread, one 16-byte access: small programs kept memory busiest
    block_rows, parts = elements // block, cdiv(num_f, block)
    dh_R2F = torch.empty_like(h_R2F) if dh_R2F is None else dh_R2F
    part_RP = torch.empty(rows, parts, dtype=torch.float32, device=b_RF.device)
    args = (b_RF, h_R2F, dh_R2F, b_RF, gate_TK, plan.slot_R, part_RP, plan.sizes_6, rows)
    constants = {"F": num_f, "ROWS": block_rows, "BLOCK": block, "TAIL": TAIL_ROWS}
    launch_swiglu_grad((cdiv(rows, block_rows), parts, 1), args, constants, num_warps=elements // 256)
    return dh_R2F, b_RF, part_RP
