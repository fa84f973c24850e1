"""Warp-specialised Hopper kernel of the weight gradients: per expert, a product whose reduction runs over its rows."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from .launch import Launcher, Ring, launch_ring
from .spans import WeightRows
from .weight_tiles import count_turns, locate, rows_of
from .ws import (
    FLAT,
    HALF,
    column_part,
    make_barriers,
    multiply,
    next_stage,
    pass_over,
    ring_desc,
    stage_out,
)


@gluon.jit
def _load_slots(slot_R, row, end, lane_row):
    return gl.load(slot_R + row + lane_row, mask=row + lane_row < end, other=0)


@gluon.jit
def _copy(
    x_ptr,
    r_desc,
    slot_R,
    left,
    right,
    full,
    empty,
    slot,
    lane_row,
    cols,
    row,
    end,
    base,
    r_col,
    stage,
    phase,
    M: gl.constexpr,
    K: gl.constexpr,
    BYTES: gl.constexpr,
    BK: gl.constexpr,
    AHEAD: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fill a stage with rows of x and rows base + row of r, if there are any.

    The slots of AHEAD steps later are loaded into the registers of this step's.
    """
    if row < end:
        mbarrier.wait(empty.index(stage), phase ^ 1)
        ready = full.index(stage)
        mbarrier.expect(ready, BYTES)
        mask = (row + lane_row < end)[:, None]
        if M % (2 * HALF) != 0:
            mask = mask & (cols < M)[None, :]
        at = x_ptr + (slot // K).to(gl.int64)[:, None] * M + cols[None, :]
        tma.async_copy_global_to_shared(r_desc, [base + row, r_col], ready, right.index(stage))
        async_copy.async_copy_global_to_shared(left.index(stage), at, mask)
        async_copy.mbarrier_arrive(ready, increment_count=False)
        stage, phase = next_stage(stage, phase, STAGES)
        slot = _load_slots(slot_R, row + AHEAD * BK, end, lane_row)
    return slot, stage, phase


@gluon.jit
def _produce(
    x_ptr,
    r_desc,
    slot_R,
    spans_E,
    bases_P4,
    left,
    right,
    full,
    empty,
    turns,
    M: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    P: gl.constexpr,
    PIECES: gl.constexpr,
    STAGES: gl.constexpr,
):
    BYTES: gl.constexpr = BK * BN * 2
    LANES: gl.constexpr = 2 * HALF // 8
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    lane_row = gl.arange(0, BK, layout=gl.SliceLayout(1, LOAD))
    lane_col = gl.arange(0, 2 * HALF, layout=gl.SliceLayout(0, LOAD))
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    for turn in range(turns):
        at, m, n = locate(turn, spans_E, M, N, BN, GROUP, P, PIECES)
        x_col, r_col = m * (2 * HALF), n * BN
        cols = x_col + lane_col
        for piece in gl.static_range(PIECES):
            row, end = rows_of(at, piece)
            x_piece, slots, base = x_ptr, slot_R, 0
            if PIECES > 1:
                x_piece = x_ptr + gl.load(bases_P4 + 4 * piece) * 8
                slots = slot_R + gl.load(bases_P4 + 4 * piece + 1)
                base = gl.load(bases_P4 + 4 * piece + 2).to(gl.int32)
            # Three sets of registers in turn: handing slots from one to another would wait for their loads every step.
            slot0 = _load_slots(slots, row, end, lane_row)
            slot1 = _load_slots(slots, row + BK, end, lane_row)
            slot2 = _load_slots(slots, row + 2 * BK, end, lane_row)
            for _ in range((end - row + 3 * BK - 1) // (3 * BK)):
                # fmt: off
                slot0, stage, phase = _copy(
                    x_piece, r_desc, slots, left, right, full, empty, slot0, lane_row, cols, row, end, base, r_col,
                    stage, phase, M, K, BYTES, BK, 3, STAGES)
                slot1, stage, phase = _copy(
                    x_piece, r_desc, slots, left, right, full, empty, slot1, lane_row, cols, row + BK, end, base, r_col,
                    stage, phase, M, K, BYTES, BK, 3, STAGES)
                slot2, stage, phase = _copy(
                    x_piece, r_desc, slots, left, right, full, empty, slot2, lane_row, cols, row + 2 * BK, end, base,
                    r_col, stage, phase, M, K, BYTES, BK, 3, STAGES)
                # fmt: on
                row += 3 * BK


@gluon.jit
def _consume(
    out_desc,
    spans_E,
    left,
    right,
    full,
    empty,
    staging,
    view,
    turns,
    part: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    FLIP: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    COLS: gl.constexpr,
    BUFS: gl.constexpr,
    GROUP: gl.constexpr,
    P: gl.constexpr,
    PIECES: gl.constexpr,
    STAGES: gl.constexpr,
):
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    PARTS: gl.constexpr = BN // COLS
    dtype: gl.constexpr = out_desc.dtype
    stage, phase, slot = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for turn in range(turns):
        at, m, n = locate(turn, spans_E, M, N, BN, GROUP, P, PIECES)
        expert, steps = gl.load(at), 0
        for piece in gl.static_range(PIECES):
            row, end = rows_of(at, piece)
            steps += (end - row + BK - 1) // BK
        out_row = (2 * m + part) * HALF
        if out_row < M:
            acc = gl.zeros([HALF, BN], gl.float32, ACC)
            acc, stage, phase = multiply(
                left, right, full, empty, acc, stage, phase, steps, part, True, False, True, STAGES
            )
            for i in gl.static_range(PARTS):
                out = column_part(acc, i, PARTS, HALF, BN).to(dtype)
                source, slot = stage_out(out, staging, view, part * BUFS, slot, FLIP, BUFS)
                col = n * BN + i * COLS
                where = [expert, col, out_row] if FLIP else [expert, out_row, col]
                tma.async_copy_shared_to_global(out_desc, where, source)
        else:
            stage, phase = pass_over(full, empty, stage, phase, steps, STAGES)
    tma.store_wait(0)


@gluon.jit
def weight_grad_ws_kernel(
    x_ptr,
    r_desc,
    out_desc,
    slot_R,
    spans_E,
    bases_P4,
    E: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    FLIP: gl.constexpr,
    COLS: gl.constexpr,
    BUFS: gl.constexpr,
    PIECES: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    P: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER_REGS: gl.constexpr,
    CONSUMER_REGS: gl.constexpr,
):
    """out[e] = x[tokens of e, M]^T @ r[rows of e, N], stored [M, N], or [N, M] with FLIP.

    x is read as zero past the expert's rows; r need only be finite there. It is the narrower side that is gathered. The
    longest reductions come first. Rows may lie in several pieces (spans.WeightRows).
    """
    BM: gl.constexpr = 2 * HALF
    TILES: gl.constexpr = E * ((M + BM - 1) // BM) * ((N + BN - 1) // BN)
    dtype: gl.constexpr = out_desc.dtype
    full, empty = make_barriers(STAGES, 1 + 128)
    left = gl.allocate_shared_memory(dtype, [STAGES, BK, BM], FLAT)
    left_halves = left._reinterpret(dtype, [2 * STAGES, BK, HALF], FLAT)  # columns lie in slabs of 64
    right = gl.allocate_shared_memory(dtype, [STAGES, BK, BN], FLAT)
    SHAPE: gl.constexpr = [2 * BUFS, COLS, HALF] if FLIP else [2 * BUFS, HALF, COLS]
    VIEW: gl.constexpr = [2 * BUFS, 1, COLS, HALF] if FLIP else [2 * BUFS, 1, HALF, COLS]
    staging = gl.allocate_shared_memory(dtype, SHAPE, FLAT)
    view = staging._reinterpret(dtype, VIEW, out_desc.layout)
    turns = count_turns(TILES, P)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (out_desc, spans_E, left_halves, right, full, empty, staging, view, turns, 0,
                        M, N, FLIP, BN, BK, COLS, BUFS, GROUP, P, PIECES, STAGES)),
            (_consume, (out_desc, spans_E, left_halves, right, full, empty, staging, view, turns, 1,
                        M, N, FLIP, BN, BK, COLS, BUFS, GROUP, P, PIECES, STAGES)),
            (_produce, (x_ptr, r_desc, slot_R, spans_E, bases_P4, left, right, full, empty, turns,
                        M, N, K, BN, BK, GROUP, P, PIECES, STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGS, PRODUCER_REGS],
    )
    # fmt: on


launch_weight_grad = Launcher(weight_grad_ws_kernel)


def weight_grad_ws(
    x_TM: torch.Tensor, r_RN: torch.Tensor, rows: WeightRows, out_E: torch.Tensor, flip: bool, ring: Ring
) -> None:
    """Fill `out_E` [E, M, N], or [E, N, M] if `flip`: per expert the sum over its rows of outer(x[token], r[row])."""
    num_m, num_n = x_TM.shape[1], r_RN.shape[1]
    args = (
        x_TM,
        ring_desc(r_RN, (ring.bk, ring.bn)),
        ring_desc(out_E, (1, ring.cols, 64) if flip else (1, 64, ring.cols)),
        rows.slot_R,
        rows.spans_E,
        rows.bases_P4,
    )
    constants = {
        "E": out_E.shape[0],
        "M": num_m,
        "N": num_n,
        "K": rows.top_k,
        "FLIP": flip,
        "COLS": ring.cols,
        "BUFS": ring.bufs,
        "PIECES": rows.pieces,
    }
    launch_ring(launch_weight_grad, ring, args, constants, (72, 216))
