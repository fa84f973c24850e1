"""Forward up-projection: gathers each row's token, multiplies by the expert's gate and up weights, applies SwiGLU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gemm_ws import rows_ws
from .launch import Launcher, Ring, Tiles, block_desc, programs
from .plan import RowPlan
from .tiles import column_part, gather_rows, halves, load_tokens, locate_tile, sigmoid, store_block


@triton.jit
def _load_gate_up(
    w_desc,
    w_ptr,
    expert,
    col,
    k,
    F: tl.constexpr,
    D: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
):
    """[2 * BF, BK]: rows col..col+BF of the expert's gate matrix, then the same rows of its up matrix."""
    if TMA:
        w = w_desc.load([2 * expert, col, k]).reshape(2 * BF, BK)
    else:
        j = tl.arange(0, 2 * BF)
        f = col + j % BF
        cols = k + tl.arange(0, BK)
        at = w_ptr + ((2 * expert + j // BF).to(tl.int64) * F + f)[:, None] * D + cols[None, :]
        w = tl.load(at, mask=(f < F)[:, None] & (cols < D)[None, :], other=0.0)
    return w


@triton.jit
def up_swiglu_kernel(
    x_ptr,
    w_desc,
    w_ptr,
    h_desc,
    h_ptr,
    a_desc,
    a_ptr,
    slot_R,
    tiles_M3,
    sizes_6,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PREC: tl.constexpr,
):
    """h[row] = [gate, up](x[token]) and a[row] = silu(gate) * up.

    Persistent, with the tile loop and the K loop fused by hand into one: the loads of the next tile are in flight
    while this tile's epilogue runs, which two nested loops do not give.
    """
    N_TILES: tl.constexpr = (F + BF - 1) // BF
    K_TILES: tl.constexpr = (D + BK - 1) // BK
    COLS: tl.constexpr = BF // SPLIT
    num_m = tl.load(sizes_6)
    pid = tl.program_id(0)
    tile = pid - P
    k = K_TILES - 1
    n, expert, row, end = 0, 0, 0, 0
    token = tl.zeros((BM,), tl.int32)
    acc = tl.zeros((BM, 2 * BF), tl.float32)
    for _ in tl.range(0, (num_m * N_TILES - pid + P - 1) // P * K_TILES):
        k = tl.where(k == K_TILES - 1, 0, k + 1)
        if k == 0:
            tile += P
            n, expert, row, end = locate_tile(tile, num_m, tiles_M3, N_TILES, GROUP)
            token = load_tokens(slot_R, row, end, K, BM)
        x = gather_rows(x_ptr, token, k * BK, D, BK)
        w = _load_gate_up(w_desc, w_ptr, expert, n * BF, k * BK, F, D, BF, BK, TMA)
        acc = tl.dot(x, w.T, acc, input_precision=PREC)
        if k == K_TILES - 1:
            gates, ups = halves(acc, BM, 2 * BF)
            dtype = h_ptr.dtype.element_ty
            for i in tl.static_range(SPLIT):
                gate = column_part(gates, i, SPLIT, BM, BF)
                up = column_part(ups, i, SPLIT, BM, BF)
                act = gate * sigmoid(gate, PREC) * up
                col = n * BF + i * COLS
                store_block(h_desc, h_ptr, gate.to(dtype), row, end, 0, col, 2, F, BM, COLS, TMA)
                store_block(h_desc, h_ptr, up.to(dtype), row, end, 1, col, 2, F, BM, COLS, TMA)
                store_block(a_desc, a_ptr, act.to(dtype), row, end, 0, col, 1, F, BM, COLS, TMA)
            acc = tl.zeros((BM, 2 * BF), tl.float32)


launch_up = Launcher(up_swiglu_kernel)


def up_swiglu(
    x_TD: torch.Tensor, plan: RowPlan, w_gate_up_E2FD: torch.Tensor, tiles: Tiles | Ring
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h_R2F`, `a_RF` for every row of the plan; rows past the plan's total are left unwritten."""
    num_experts, _, num_f, num_d = w_gate_up_E2FD.shape
    h_R2F = x_TD.new_empty(plan.max_rows, 2 * num_f)
    a_RF = x_TD.new_empty(plan.max_rows, num_f)
    if isinstance(tiles, Ring):
        outs = (h_R2F.view(-1, 2, num_f), a_RF.view(-1, 1, num_f))
        rows_ws(x_TD, plan, w_gate_up_E2FD, outs, tiles, up=True)
        return h_R2F, a_RF
    w_desc = block_desc(w_gate_up_E2FD.view(2 * num_experts, num_f, num_d), (2, tiles.bn, tiles.bk), tiles.tma)
    h_desc = block_desc(h_R2F.view(-1, 2, num_f), (tiles.bm, 1, tiles.bn // tiles.split), tiles.tma)
    a_desc = block_desc(a_RF.view(-1, 1, num_f), (tiles.bm, 1, tiles.bn // tiles.split), tiles.tma)
    p = programs(tiles)
    args = (
        x_TD,
        w_desc,
        w_gate_up_E2FD,
        h_desc,
        h_R2F,
        a_desc,
        a_RF,
        plan.slot_R,
        plan.tiles_M3,
        plan.sizes_6,
    )
    constants = {
        "D": num_d,
        "F": num_f,
        "K": plan.top_k,
        "BM": tiles.bm,
        "BF": tiles.bn,
        "BK": tiles.bk,
        "GROUP": tiles.group,
        "P": p,
        "SPLIT": tiles.split,
        "TMA": tiles.tma,
        "PREC": tiles.precision,
    }
    launch_up((p, 1, 1), args, constants, num_warps=tiles.warps, num_stages=tiles.stages)
    return h_R2F, a_RF
