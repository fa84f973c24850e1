"""Weight gradients: per expert, a GEMM whose reduction runs over that expert's rows (variable K)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Tiles, block_desc, programs
from .plan import RowPlan
from .tiles import column_part, load_block


@triton.jit
def _gather_masked(x_ptr, slot_R, row, end, col, K: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
                   COLS: tl.constexpr):
    """[ROWS, COLS] of the rows' tokens; zero at and past `end`, so the other operand may hold anything finite there."""
    rows = row + tl.arange(0, ROWS)
    cols = col + tl.arange(0, COLS)
    token = tl.load(slot_R + rows, mask=rows < end, other=0) // K
    at = x_ptr + token.to(tl.int64)[:, None] * N + cols[None, :]
    if N % COLS == 0:
        x = tl.load(at, mask=(rows < end)[:, None], other=0.0)
    else:
        x = tl.load(at, mask=(rows < end)[:, None] & (cols < N)[None, :], other=0.0)
    return x


@triton.jit
def weight_grad_kernel(x_ptr, r_desc, r_ptr, out_desc, out_ptr, slot_R, spans_E3, num_rows, E: tl.constexpr,
                       E_POW2: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                       GATHER_LEFT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                       GROUP: tl.constexpr, P: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr,
                       PREC: tl.constexpr):
    """out[e, M, N] = left[rows of e, M]^T @ right[rows of e, N]; one side is gathered from x by token, the other,
    in row order, is r. The longest reductions come first; tile and reduction loops are fused by hand.
    """
    M_TILES: tl.constexpr = (M + BM - 1) // BM
    N_TILES: tl.constexpr = (N + BN - 1) // BN
    COLS: tl.constexpr = BN // SPLIT
    PER_EXPERT: tl.constexpr = M_TILES * N_TILES
    pid = tl.program_id(0)
    # Steps of this program: for each expert the tiles that fall to it, times the expert's reduction length.
    e = tl.arange(0, E_POW2)
    rows_of = tl.load(spans_E3 + 3 * e + 2, mask=e < E, other=0) - tl.load(spans_E3 + 3 * e + 1, mask=e < E, other=0)
    tiles_of = ((e + 1) * PER_EXPERT - pid + P - 1) // P - (e * PER_EXPERT - pid + P - 1) // P
    steps = tl.sum(tl.where(e < E, tiles_of * tl.maximum(1, (rows_of + BK - 1) // BK), 0))
    tile = pid - P
    row, last, expert, end, m, n = 0, 0, 0, 0, 0, 0
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in tl.range(0, steps):
        row += BK
        if row >= last:
            tile += P
            at = spans_E3 + 3 * (tile // PER_EXPERT)
            expert, row, end = tl.load(at), tl.load(at + 1), tl.load(at + 2)
            last = tl.maximum(end, row + 1)  # an expert without rows still takes one step, which stores zeros
            inside = tile % PER_EXPERT
            first = inside // (GROUP * N_TILES) * GROUP
            size = tl.minimum(M_TILES - first, GROUP)
            m = first + inside % (GROUP * N_TILES) % size
            n = inside % (GROUP * N_TILES) // size
        if GATHER_LEFT:
            left = _gather_masked(x_ptr, slot_R, row, end, m * BM, K, M, BK, BM)
            right = load_block(r_desc, r_ptr, row, n * BN, num_rows, N, BK, BN, TMA)
        else:
            left = load_block(r_desc, r_ptr, row, m * BM, num_rows, M, BK, BM, TMA)
            right = _gather_masked(x_ptr, slot_R, row, end, n * BN, K, N, BK, BN)
        acc = tl.dot(left.T, right, acc, input_precision=PREC)
        if row + BK >= last:
            for i in tl.static_range(SPLIT):
                out = column_part(acc, i, SPLIT, BM, BN).to(out_ptr.dtype.element_ty)
                col = n * BN + i * COLS
                if TMA:
                    out_desc.store([expert, m * BM, col], out.reshape(1, BM, COLS))
                else:
                    rows = m * BM + tl.arange(0, BM)
                    cols = col + tl.arange(0, COLS)
                    mask = (rows < M)[:, None] & (cols < N)[None, :]
                    tl.store(out_ptr + (expert.to(tl.int64) * M + rows)[:, None] * N + cols[None, :], out, mask=mask)
            acc = tl.zeros((BM, BN), tl.float32)


def weight_grad(
    x_TX: torch.Tensor, r_RC: torch.Tensor, plan: RowPlan, out_EMN: torch.Tensor, gather_left: bool, tiles: Tiles
) -> torch.Tensor:
    """Fill and return `out_EMN`: sum over an expert's rows of outer(x[token], r[row]), or the other way round.

    r must be finite up to TAIL_ROWS past the last row (down_grad zeroes them).
    """
    num_experts, num_m, num_n = out_EMN.shape
    r_block = (tiles.bk, tiles.bn if gather_left else tiles.bm)
    r_desc = block_desc(r_RC, r_block, tiles.tma)
    out_desc = block_desc(out_EMN, (1, tiles.bm, tiles.bn // tiles.split), tiles.tma)
    p = programs(tiles, num_experts * triton.cdiv(num_m, tiles.bm) * triton.cdiv(num_n, tiles.bn))
    weight_grad_kernel[(p,)](
        x_TX, r_desc, r_RC, out_desc, out_EMN, plan.slot_R, plan.spans_E3, r_RC.shape[0], E=num_experts,
        E_POW2=triton.next_power_of_2(num_experts), M=num_m, N=num_n, K=plan.top_k, GATHER_LEFT=gather_left,
        BM=tiles.bm, BN=tiles.bn, BK=tiles.bk, GROUP=tiles.group, P=p, SPLIT=tiles.split, TMA=tiles.tma,
        PREC=tiles.precision, num_warps=tiles.warps, num_stages=tiles.stages)
    return out_EMN
