"""Backward through gate weight, down-projection and SwiGLU in one pass, from the pre-activation H alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Tiles, block_desc, programs
from .plan import RowPlan
from .tiles import column_part, gather_rows, load_block, load_tokens, locate_tile, store_block

TAIL_ROWS = 128  # at least the reduction block of the weight-gradient kernel


@triton.jit
def _zero_tail(ptr, first, num_rows, pid, N: tl.constexpr, P: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """Zero the rows [first, first + TAIL) that exist: a reduction over rows may read, masked by zeros, past the end."""
    for r in range(pid, TAIL, P):
        row = first + r
        for start in range(0, N, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = (cols < N) & (row < num_rows)
            tl.store(ptr + row.to(tl.int64) * N + cols, tl.zeros((BLOCK,), ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_half(desc, ptr, row, end, half: tl.constexpr, col, F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
               TMA: tl.constexpr):
    if TMA:
        x = desc.load([row, half, col]).reshape(ROWS, COLS)
    else:
        rows = row + tl.arange(0, ROWS)
        cols = col + tl.arange(0, COLS)
        mask = (rows < end)[:, None] & (cols < F)[None, :]
        x = tl.load(ptr + rows.to(tl.int64)[:, None] * (2 * F) + half * F + cols[None, :], mask=mask, other=0.0)
    return x


@triton.jit
def _swiglu_grad(b, gate_row, h_desc, h_ptr, dh_desc, dh_ptr, a_desc, a_ptr, row, end, col, F: tl.constexpr,
                 BM: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """Store dH and gate * A of one [BM, COLS] block; returns its part of each row's gate gradient."""
    g = _load_half(h_desc, h_ptr, row, end, 0, col, F, BM, COLS, TMA).to(tl.float32)
    u = _load_half(h_desc, h_ptr, row, end, 1, col, F, BM, COLS, TMA).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    act = silu * u
    part = tl.sum(b * act, axis=1)
    da = b * gate_row[:, None]
    dtype = a_ptr.dtype.element_ty
    dg = (da * u * (s + silu * (1.0 - s))).to(dtype)
    store_block(dh_desc, dh_ptr, dg, row, end, 0, col, 2, F, BM, COLS, TMA)
    store_block(dh_desc, dh_ptr, (da * silu).to(dtype), row, end, 1, col, 2, F, BM, COLS, TMA)
    store_block(a_desc, a_ptr, (act * gate_row[:, None]).to(dtype), row, end, 0, col, 1, F, BM, COLS, TMA)
    return part


@triton.jit
def down_grad_kernel(dy_ptr, gate_S, w_desc, w_ptr, h_desc, h_ptr, dh_desc, dh_ptr, a_desc, a_ptr, part_ptr, slot_R,
                     tiles_M3, sizes_2, num_rows, num_w_rows, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
                     BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr,
                     SPLIT: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr):
    """b = dy[token] @ W_down, then dH, gate * A, and the inner product <b, A> of this column tile.

    The epilogue works on SPLIT column parts in turn, so that H, dH and A are never all in registers beside b.
    """
    N_TILES: tl.constexpr = (F + BF - 1) // BF
    K_TILES: tl.constexpr = (D + BK - 1) // BK
    COLS: tl.constexpr = BF // SPLIT
    num_m = tl.load(sizes_2)
    pid = tl.program_id(0)
    total = tl.load(sizes_2 + 1)
    _zero_tail(dh_ptr, total, num_rows, pid, 2 * F, P, TAIL, 1024)
    _zero_tail(a_ptr, total, num_rows, pid, F, P, TAIL, 1024)
    tile = pid - P
    k = K_TILES - 1
    n, expert, row, end = 0, 0, 0, 0
    token = tl.zeros((BM,), tl.int32)
    acc = tl.zeros((BM, BF), tl.float32)
    for _ in tl.range(0, (num_m * N_TILES - pid + P - 1) // P * K_TILES):
        k = tl.where(k == K_TILES - 1, 0, k + 1)
        if k == 0:
            tile += P
            n, expert, row, end = locate_tile(tile, num_m, tiles_M3, N_TILES, GROUP)
            token = load_tokens(slot_R, row, end, K, BM)
        dy = gather_rows(dy_ptr, token, k * BK, D, BK)
        w = load_block(w_desc, w_ptr, expert * D + k * BK, n * BF, num_w_rows, F, BK, BF, TMA)
        acc = tl.dot(dy, w, acc, input_precision=PREC)
        if k == K_TILES - 1:
            rows = row + tl.arange(0, BM)
            slot = tl.load(slot_R + rows, mask=rows < end, other=0)
            gate = tl.load(gate_S + slot, mask=rows < end, other=0.0).to(tl.float32)
            part = tl.zeros((BM,), tl.float32)
            for i in tl.static_range(SPLIT):
                b = column_part(acc, i, SPLIT, BM, BF)
                part += _swiglu_grad(b, gate, h_desc, h_ptr, dh_desc, dh_ptr, a_desc, a_ptr, row, end,
                                     n * BF + i * COLS, F, BM, COLS, TMA)
            tl.store(part_ptr + rows.to(tl.int64) * N_TILES + n, part, mask=rows < end)
            acc = tl.zeros((BM, BF), tl.float32)


def down_grad(
    dy_TD: torch.Tensor, gate_TK: torch.Tensor, plan: RowPlan, w_down_EDF: torch.Tensor, h_R2F: torch.Tensor,
    tiles: Tiles,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`dh_R2F`, `gate * a_RF`, and `part_RN` (fp32), whose sum over N is each row's gate gradient."""
    num_d, num_f = w_down_EDF.shape[1:]
    rows = plan.max_rows
    dh_R2F, a_RF = torch.empty_like(h_R2F), h_R2F.new_empty(rows, num_f)
    n_tiles = triton.cdiv(num_f, tiles.bn)
    part_RN = torch.empty(rows, n_tiles, dtype=torch.float32, device=h_R2F.device)
    w_rows = w_down_EDF.view(-1, num_f)
    cols = tiles.bn // tiles.split
    w_desc = block_desc(w_rows, (tiles.bk, tiles.bn), tiles.tma)
    h_desc = block_desc(h_R2F.view(rows, 2, num_f), (tiles.bm, 1, cols), tiles.tma)
    dh_desc = block_desc(dh_R2F.view(rows, 2, num_f), (tiles.bm, 1, cols), tiles.tma)
    a_desc = block_desc(a_RF.view(rows, 1, num_f), (tiles.bm, 1, cols), tiles.tma)
    p = programs(tiles, plan.tiles_M3.shape[0] * n_tiles)
    down_grad_kernel[(p,)](
        dy_TD, gate_TK, w_desc, w_down_EDF, h_desc, h_R2F, dh_desc, dh_R2F, a_desc, a_RF, part_RN, plan.slot_R,
        plan.tiles_M3, plan.sizes_2, rows, w_rows.shape[0], D=num_d, F=num_f, K=plan.top_k, BM=tiles.bm, BF=tiles.bn,
        BK=tiles.bk, GROUP=tiles.group, P=p, SPLIT=tiles.split, TAIL=TAIL_ROWS, TMA=tiles.tma, PREC=tiles.precision,
        num_warps=tiles.warps, num_stages=tiles.stages)
    return dh_R2F, a_RF, part_RN
