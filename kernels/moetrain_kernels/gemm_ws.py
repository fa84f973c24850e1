"""Warp-specialised Hopper kernel over row tiles: the up-projection with SwiGLU, and the plain grouped products."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from .launch import Launcher, Ring, launch_ring
from .plan import COUNTERS, RowPlan
from .ws import (
    FLAT,
    HALF,
    column_part,
    gathered,
    halves,
    hear,
    logistic,
    make_barriers,
    make_box,
    multiply,
    next_stage,
    pass_over,
    put_rows,
    ragged_desc,
    ring_desc,
    take,
    tell,
)


@gluon.jit
def locate(tile, num_m, tiles_M3, N_TILES: gl.constexpr, GROUP: gl.constexpr):
    """(column tile, expert, first row, end row) of a flat tile number: GROUP row tiles share weight columns in L2."""
    per_group: gl.constexpr = GROUP * N_TILES
    first = tile // per_group * GROUP
    size = gl.minimum(num_m - first, GROUP)
    inside = tile % per_group
    m = first + inside % size
    return inside // size, gl.load(tiles_M3 + 3 * m), gl.load(tiles_M3 + 3 * m + 1), gl.load(tiles_M3 + 3 * m + 2)


@gluon.jit
def _produce(
    a_desc,
    a_ptr,
    w_desc,
    slot_R,
    tiles_M3,
    num_m,
    counter,
    box,
    told,
    heard,
    a_ring,
    w_ring,
    full,
    empty,
    N: gl.constexpr,
    C: gl.constexpr,
    K: gl.constexpr,
    UP: gl.constexpr,
    W_NC: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    P: gl.constexpr,
    STAGES: gl.constexpr,
):
    N_TILES: gl.constexpr = (N + BN - 1) // BN
    K_TILES: gl.constexpr = (C + BK - 1) // BK
    BM: gl.constexpr = 2 * HALF
    WIDTH: gl.constexpr = 2 * BN if UP else BN
    BYTES: gl.constexpr = WIDTH * BK * 2 if UP else (WIDTH + BM) * BK * 2
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    tile, round = gl.program_id(0), 0
    while tile < num_m * N_TILES:
        n, expert, row, end = locate(tile, num_m, tiles_M3, N_TILES, GROUP)
        tell(box, told, heard, round, n, row, end)
        following = tile + P
        if UP:
            at, used = gathered(a_ptr, slot_R, row, end, C, K, BK)
        for k in range(K_TILES):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, BYTES)
            if UP:
                w_row = 2 * expert * N + n * BN
                tma.async_copy_global_to_shared(w_desc, [w_row, k * BK], ready, w_ring.index(2 * stage))
                tma.async_copy_global_to_shared(w_desc, [w_row + N, k * BK], ready, w_ring.index(2 * stage + 1))
            elif W_NC:
                tma.async_copy_global_to_shared(w_desc, [expert * N + n * BN, k * BK], ready, w_ring.index(stage))
            else:
                tma.async_copy_global_to_shared(w_desc, [expert * C + k * BK, n * BN], ready, w_ring.index(stage))
            if UP:
                async_copy.async_copy_global_to_shared(a_ring.index(stage), at + k * BK, used)
                async_copy.mbarrier_arrive(ready, increment_count=False)
            else:
                tma.async_copy_global_to_shared(a_desc, [row, k * BK], ready, a_ring.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
            if k == K_TILES // 2:  # the ring is full by now, which hides the counter's latency
                following = take(counter, num_m * N_TILES, P)
        tile, round = following, round + 1
    tell(box, told, heard, round, 0, 0, 0)


@gluon.jit
def _consume(
    out_desc,
    act_desc,
    box,
    told,
    heard,
    a_halves,
    w_ring,
    full,
    empty,
    staging,
    view,
    part: gl.constexpr,
    N: gl.constexpr,
    C: gl.constexpr,
    UP: gl.constexpr,
    W_NC: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    COLS: gl.constexpr,
    BUFS: gl.constexpr,
    STAGES: gl.constexpr,
):
    K_TILES: gl.constexpr = (C + BK - 1) // BK
    WIDTH: gl.constexpr = 2 * BN if UP else BN
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    PARTS: gl.constexpr = BN // COLS
    BASE: gl.constexpr = part * BUFS
    dtype: gl.constexpr = out_desc.dtype
    stage, phase, turn = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    round = 0
    n, row, end = hear(box, told, heard, round)
    while end > 0:
        row += part * HALF
        if row < end:
            acc = gl.zeros([HALF, WIDTH], gl.float32, ACC)
            acc, stage, phase = multiply(
                a_halves, w_ring, full, empty, acc, stage, phase, K_TILES, part, False, W_NC, UP, STAGES
            )
            if UP:
                gates, ups = halves(acc, HALF, WIDTH)
                for i in gl.static_range(PARTS):
                    gate = column_part(gates, i, PARTS, HALF, BN)
                    up = column_part(ups, i, PARTS, HALF, BN)
                    col = n * BN + i * COLS
                    turn = put_rows(out_desc, gate.to(dtype), staging, view, BASE, turn, row, end, 0, col, BUFS)
                    turn = put_rows(out_desc, up.to(dtype), staging, view, BASE, turn, row, end, 1, col, BUFS)
                    act = gate * logistic(gate) * up
                    turn = put_rows(act_desc, act.to(dtype), staging, view, BASE, turn, row, end, 0, col, BUFS)
            else:
                for i in gl.static_range(PARTS):
                    out = column_part(acc, i, PARTS, HALF, BN).to(dtype)
                    turn = put_rows(out_desc, out, staging, view, BASE, turn, row, end, 0, n * BN + i * COLS, BUFS)
        else:
            stage, phase = pass_over(full, empty, stage, phase, K_TILES, STAGES)
        round += 1
        n, row, end = hear(box, told, heard, round)
    tma.store_wait(0)


@gluon.jit
def rows_ws_kernel(
    a_desc,
    a_ptr,
    w_desc,
    out_desc,
    act_desc,
    slot_R,
    tiles_M3,
    sizes_6,
    N: gl.constexpr,
    C: gl.constexpr,
    K: gl.constexpr,
    UP: gl.constexpr,
    W_NC: gl.constexpr,
    COLS: gl.constexpr,
    BUFS: gl.constexpr,
    COUNTER: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    P: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER_REGS: gl.constexpr,
    CONSUMER_REGS: gl.constexpr,
):
    """out[row, N] = a[row, C] times the expert's matrix, stored [N, C] (W_NC) or [C, N].

    With UP (and W_NC) the matrices are gate and up, [2, N, C]; a is in token order and a[token of row] is meant; out is
    [rows, 2, N], and act = silu(gate) * up goes to act_desc. Row tiles have 128 rows; a tile with at most 64 rows in
    use costs one warpgroup's work only.
    """
    BM: gl.constexpr = 2 * HALF
    WIDTH: gl.constexpr = 2 * BN if UP else BN
    dtype: gl.constexpr = out_desc.dtype
    num_m = gl.load(sizes_6)
    box, told, heard = make_box()
    full, empty = make_barriers(STAGES, 1 + 128 if UP else 1)
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], FLAT)
    a_halves = a_ring._reinterpret(dtype, [2 * STAGES, HALF, BK], FLAT)
    if not W_NC:
        w_ring = gl.allocate_shared_memory(dtype, [STAGES, BK, WIDTH], FLAT)
    else:
        w_ring = gl.allocate_shared_memory(dtype, [STAGES, WIDTH, BK], FLAT)
    if UP:
        w_target = w_ring._reinterpret(dtype, [2 * STAGES, BN, BK], FLAT)
    else:
        w_target = w_ring
    staging = gl.allocate_shared_memory(dtype, [2 * BUFS, HALF, COLS], FLAT)
    view = staging._reinterpret(dtype, [2 * BUFS, 1, 1, HALF, 1, COLS], out_desc.layout)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (out_desc, act_desc, box, told, heard, a_halves, w_ring, full, empty, staging, view, 0,
                        N, C, UP, W_NC, BN, BK, COLS, BUFS, STAGES)),
            (_consume, (out_desc, act_desc, box, told, heard, a_halves, w_ring, full, empty, staging, view, 1,
                        N, C, UP, W_NC, BN, BK, COLS, BUFS, STAGES)),
            (_produce, (a_desc, a_ptr, w_desc, slot_R, tiles_M3, num_m, sizes_6 + COUNTER, box, told, heard,
                        a_ring, w_target, full, empty,
                        N, C, K, UP, W_NC, BN, BK, GROUP, P, STAGES)),
        ],
        [4, 4 if UP else 1],
        [CONSUMER_REGS, PRODUCER_REGS],
    )
    # fmt: on


launch_rows = Launcher(rows_ws_kernel)


def rows_ws(
    a: torch.Tensor,
    plan: RowPlan,
    w: torch.Tensor,
    outs: tuple[torch.Tensor, ...],
    ring: Ring,
    up: bool = False,
    transposed: bool = False,
) -> None:
    """Fill `outs`: (h [R, 2, N], act [R, 1, N]) if `up`, otherwise (out [R, 1, N],).

    `a` is [R, C] in row order, or [T, C] in token order if `up` (C then a multiple of 64); `w` is [E, 2, N, C] if `up`,
    [E, C, N] if `transposed`, else [E, N, C]. A plan serves one product of each kind, repeated as often as one likes.
    """
    num_n, num_c = (w.shape[-1], w.shape[-2]) if transposed else (w.shape[-2], w.shape[-1])
    out_descs = [ragged_desc(out, (64, ring.cols)) for out in outs]
    args = (
        a if up else ring_desc(a, (128, ring.bk)),
        a,
        ring_desc(w.view(-1, w.shape[-1]), (ring.bk, ring.bn) if transposed else (ring.bn, ring.bk)),
        out_descs[0],
        out_descs[-1],
        plan.slot_R,
        plan.tiles_M3,
        plan.sizes_6,
    )
    constants = {
        "N": num_n,
        "C": num_c,
        "K": plan.top_k,
        "UP": up,
        "W_NC": not transposed,
        "COLS": ring.cols,
        "BUFS": ring.bufs,
        "COUNTER": COUNTERS["up" if up else "dx" if transposed else "down"],
    }
    launch_ring(launch_rows, ring, args, constants, (72, 216) if up else (24, 240))
