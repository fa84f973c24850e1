"""Grouped GEMM: the down-projection, its gradient (rows gathered by token), and the gradient of the gathered x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gemm_ws import rows_ws
from .launch import Launcher, Ring, Tiles, block_desc, programs
from .plan import RowPlan
from .tiles import column_part, gather_rows, load_block, load_tokens, locate_tile, store_block


@triton.jit(do_not_specialize=["num_rows", "num_w_rows"])
def grouped_gemm_kernel(
    a_desc,
    a_ptr,
    w_desc,
    w_ptr,
    out_desc,
    out_ptr,
    slot_R,
    tiles_M3,
    sizes_6,
    num_rows,
    num_w_rows,
    N: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    GATHER: tl.constexpr,
    W_NC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PREC: tl.constexpr,
):
    """out[row, N] = a[row, C] times the expert's matrix, stored [N, C] (W_NC) or [C, N], all experts stacked by rows.
    With GATHER, a is in token order and a[token of row] is meant.

    Tile and reduction loops are fused by hand, as in up_swiglu_kernel. A weight block may run into the next expert's
    rows: along N those columns are not stored, along C they meet the zeros that `a` reads past its last column.
    """
    N_TILES: tl.constexpr = (N + BN - 1) // BN
    K_TILES: tl.constexpr = (C + BK - 1) // BK
    COLS: tl.constexpr = BN // SPLIT
    num_m = tl.load(sizes_6)
    pid = tl.program_id(0)
    tile = pid - P
    k = K_TILES - 1
    n, expert, row, end = 0, 0, 0, 0
    token = tl.zeros((BM,), tl.int32)
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in tl.range(0, (num_m * N_TILES - pid + P - 1) // P * K_TILES):
        k = tl.where(k == K_TILES - 1, 0, k + 1)
        if k == 0:
            tile += P
            n, expert, row, end = locate_tile(tile, num_m, tiles_M3, N_TILES, GROUP)
            if GATHER:
                token = load_tokens(slot_R, row, end, K, BM)
        if GATHER:
            a = gather_rows(a_ptr, token, k * BK, C, BK)
        else:
            a = load_block(a_desc, a_ptr, row, k * BK, num_rows, C, BM, BK, TMA)
        if W_NC:
            w = load_block(w_desc, w_ptr, expert * N + n * BN, k * BK, num_w_rows, C, BN, BK, TMA).T
        else:
            w = load_block(w_desc, w_ptr, expert * C + k * BK, n * BN, num_w_rows, N, BK, BN, TMA)
        acc = tl.dot(a, w, acc, input_precision=PREC)
        if k == K_TILES - 1:
            for i in tl.static_range(SPLIT):
                out = column_part(acc, i, SPLIT, BM, BN).to(out_ptr.dtype.element_ty)
                store_block(out_desc, out_ptr, out, row, end, 0, n * BN + i * COLS, 1, N, BM, COLS, TMA)
            acc = tl.zeros((BM, BN), tl.float32)


launch_gemm = Launcher(grouped_gemm_kernel)


def grouped_gemm(
    a: torch.Tensor,
    plan: RowPlan,
    w_E: torch.Tensor,
    tiles: Tiles | Ring,
    transposed: bool = False,
    gather: bool = False,
    out_RN: torch.Tensor | None = None,
) -> torch.Tensor:
    """`out_RN`: each row times its expert's matrix, `w_E` being [E, N, C], or [E, C, N] if `transposed`.

    `a` is [R, C] in row order, or [T, C] in token order if `gather`. Rows past the plan's total stay unwritten.
    """
    num_n, num_c = (w_E.shape[2], w_E.shape[1]) if transposed else (w_E.shape[1], w_E.shape[2])
    if out_RN is None:
        out_RN = a.new_empty(plan.max_rows, num_n)
    if isinstance(tiles, Ring):
        assert not gather  # only down_grad gathers, and has a kernel of its own there
        rows_ws(a, plan, w_E, (out_RN.view(-1, 1, num_n),), tiles, transposed=transposed)
        return out_RN
    w_rows = w_E.view(-1, w_E.shape[2])
    w_block = (tiles.bk, tiles.bn) if transposed else (tiles.bn, tiles.bk)
    a_desc = block_desc(a, (tiles.bm, tiles.bk), tiles.tma and not gather)  # a gradient from outside may be unaligned
    w_desc = block_desc(w_rows, w_block, tiles.tma)
    out_desc = block_desc(out_RN.view(-1, 1, num_n), (tiles.bm, 1, tiles.bn // tiles.split), tiles.tma)
    p = programs(tiles)
    args = (
        a_desc,
        a,
        w_desc,
        w_rows,
        out_desc,
        out_RN,
        plan.slot_R,
        plan.tiles_M3,
        plan.sizes_6,
        a.shape[0],
        w_rows.shape[0],
    )
    constants = {
        "N": num_n,
        "C": num_c,
        "K": plan.top_k,
        "GATHER": gather,
        "W_NC": not transposed,
        "BM": tiles.bm,
        "BN": tiles.bn,
        "BK": tiles.bk,
        "GROUP": tiles.group,
        "P": p,
        "SPLIT": tiles.split,
        "TMA": tiles.tma,
        "PREC": tiles.precision,
    }
    launch_gemm((p, 1, 1), args, constants, num_warps=tiles.warps, num_stages=tiles.stages)
    return out_RN
