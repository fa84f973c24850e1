"""Weight gradients: per expert, a GEMM whose reduction runs over that expert's rows (variable K)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launcher, Ring, Tiles, block_desc, power_of_2, programs
from .spans import WeightRows
from .tiles import column_part, load_block
from .weight_grad_ws import weight_grad_ws


@triton.jit
def _load_slots(slot_R, row, end, BLOCK: tl.constexpr):
    rows = row + tl.arange(0, BLOCK)
    return tl.load(slot_R + rows, mask=rows < end, other=0)


@triton.jit
def _gather_masked(
    x_ptr, slot, row, end, col, K: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """[ROWS, COLS] of the slots' tokens; zero at and past `end`: the other operand need only be finite there."""
    cols = col + tl.arange(0, COLS)
    at = x_ptr + (slot // K).to(tl.int64)[:, None] * N + cols[None, :]
    mask = (row + tl.arange(0, ROWS) < end)[:, None]
    if N % COLS != 0:
        mask = mask & (cols < N)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _tile_of(turn, pid, P: tl.constexpr):
    """Tile that program `pid` takes in round `turn`: odd rounds run backwards, since tiles come longest first and
    the program that got the longest of one round should get the shortest of the next."""
    return turn * P + tl.where(turn % 2 == 0, pid, P - 1 - pid)


@triton.jit
def _tiles_below(n, pid, P: tl.constexpr):
    """How many tiles numbered below n fall to program `pid`: two in every pair of rounds."""
    rest = n % (2 * P)
    return n // (2 * P) * 2 + (rest > pid).to(tl.int32) + (rest > 2 * P - 1 - pid).to(tl.int32)


@triton.jit
def _count_steps(
    spans_E,
    steps_P,
    pid,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    P: tl.constexpr,
    PIECES: tl.constexpr,
    BK: tl.constexpr,
):
    """Reduction steps of program `pid`: over the experts, its tiles times the expert's reduction length.

    The sum takes a detour through memory: the compiler takes a loaded scalar for uniform over the warp, a reduced one
    for divergent, and would keep the whole main loop off the uniform registers that feed the tensor cores.
    """
    e = tl.arange(0, E_POW2)
    tiles = _tiles_below((e + 1) * PER_EXPERT, pid, P) - _tiles_below(e * PER_EXPERT, pid, P)
    length = tl.zeros((E_POW2,), tl.int32)
    for piece in tl.static_range(PIECES):
        at = spans_E + (1 + 2 * PIECES) * e + 1 + 2 * piece
        rows = tl.load(at + 1, mask=e < E, other=0) - tl.load(at, mask=e < E, other=0)
        length += tl.maximum(1, (rows + BK - 1) // BK)
    tl.store(steps_P + pid, tl.sum(tl.where(e < E, tiles * length, 0)))
    tl.debug_barrier()
    return tl.load(steps_P + pid, volatile=True)


@triton.jit
def _store_part(
    desc,
    ptr,
    value,
    expert,
    row,
    col,
    M: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Store [ROWS, COLS] at [expert, row, col] of an [E, M, N] tensor."""
    if TMA:
        desc.store([expert, row, col], value.reshape(1, ROWS, COLS))
    else:
        rows = row + tl.arange(0, ROWS)
        cols = col + tl.arange(0, COLS)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(ptr + (expert.to(tl.int64) * M + rows)[:, None] * N + cols[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def weight_grad_kernel(
    x_ptr,
    r_desc,
    r_ptr,
    out_desc,
    out_ptr,
    slot_R,
    spans_E,
    bases_P4,
    steps_P,
    num_rows,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    FLIP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    PIECES: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PREC: tl.constexpr,
):
    """out[e] = x[tokens of e, M]^T @ r[rows of e, N], stored [M, N], or [N, M] with FLIP, over the rows of all pieces.

    The gathered side is always the left one, which is the narrower tile: its loads cost instructions, TMA's do not.
    The longest reductions come first; tile and reduction loops are fused by hand as in up_swiglu_kernel. The
    pipeliner also loads the slots ahead, into shared memory, which takes two of its stages: 5 stages are 3 buffers.
    """
    M_TILES: tl.constexpr = (M + BM - 1) // BM
    N_TILES: tl.constexpr = (N + BN - 1) // BN
    COLS: tl.constexpr = BN // SPLIT
    PER_EXPERT: tl.constexpr = M_TILES * N_TILES
    pid = tl.program_id(0)
    UNIT: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    steps = _count_steps(spans_E, steps_P, pid, E, E_POW2, PER_EXPERT, P, PIECES, BK)
    turn = -1
    piece = PIECES - 1
    x_base, slot_base, r_base = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), 0
    row, last, expert, end, m, n = 0, 0, 0, 0, 0, 0
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in tl.range(0, steps):
        row += BK
        if row >= last:
            if PIECES > 1:
                turn += (piece == PIECES - 1).to(tl.int32)
                piece = tl.where(piece == PIECES - 1, 0, piece + 1)
            else:
                turn += 1
            tile = _tile_of(turn, pid, P)
            at = spans_E + (1 + 2 * PIECES) * (tile // PER_EXPERT)
            expert, row, end = tl.load(at), tl.load(at + 1 + 2 * piece), tl.load(at + 2 + 2 * piece)
            last = tl.maximum(end, row + 1)  # an expert without rows still takes one step, which adds zeros
            if PIECES > 1:
                base = bases_P4 + 4 * piece
                x_base, slot_base, r_base = tl.load(base), tl.load(base + 1), tl.load(base + 2).to(tl.int32)
            inside = tile % PER_EXPERT
            first = inside // (GROUP * N_TILES) * GROUP
            size = tl.minimum(M_TILES - first, GROUP)
            m = first + inside % (GROUP * N_TILES) % size
            n = inside % (GROUP * N_TILES) // size
        slots, x_piece, r_row = slot_R, x_ptr, row
        if PIECES > 1:
            slots, x_piece, r_row = slot_R + slot_base, x_ptr + x_base * UNIT, r_base + row
        slot = _load_slots(slots, row, end, BK)
        left = _gather_masked(x_piece, slot, row, end, m * BM, K, M, BK, BM)
        right = load_block(r_desc, r_ptr, r_row, n * BN, num_rows, N, BK, BN, TMA)
        acc = tl.dot(left.T, right, acc, input_precision=PREC)
        if (row + BK >= last) & (piece == PIECES - 1):
            for i in tl.static_range(SPLIT):
                out = column_part(acc, i, SPLIT, BM, BN).to(out_ptr.dtype.element_ty)
                col = n * BN + i * COLS
                if FLIP:
                    _store_part(out_desc, out_ptr, out.T, expert, col, m * BM, N, M, COLS, BM, TMA)
                else:
                    _store_part(out_desc, out_ptr, out, expert, m * BM, col, M, N, BM, COLS, TMA)
            acc = tl.zeros((BM, BN), tl.float32)


launch_weight_grad = Launcher(weight_grad_kernel)


def weight_grad(
    x_TM: torch.Tensor, r_RN: torch.Tensor, rows: WeightRows, out_E: torch.Tensor, flip: bool, tiles: Tiles | Ring
) -> torch.Tensor:
    """Fill and return `out_E`: per expert the sum over its rows of outer(x[token], r[row]), transposed if `flip`.

    `out_E` is [E, M, N], or [E, N, M] if `flip`. r must be finite up to TAIL_ROWS past each piece's last row
    (swiglu_grad zeroes them). Of several pieces x is the first one's; the others' are where `rows` says.
    """
    if isinstance(tiles, Ring):
        weight_grad_ws(x_TM, r_RN, rows, out_E, flip, tiles)
        return out_E
    num_experts, num_m, num_n = out_E.shape[0], x_TM.shape[1], r_RN.shape[1]
    cols = tiles.bn // tiles.split
    r_desc = block_desc(r_RN, (tiles.bk, tiles.bn), tiles.tma)
    out_desc = block_desc(out_E, (1, cols, tiles.bm) if flip else (1, tiles.bm, cols), tiles.tma)
    p = programs(tiles)
    steps_P = torch.empty(p, dtype=torch.int32, device=r_RN.device)
    args = (x_TM, r_desc, r_RN, out_desc, out_E, rows.slot_R, rows.spans_E, rows.bases_P4, steps_P, r_RN.shape[0])
    constants = {
        "E": num_experts,
        "E_POW2": power_of_2(num_experts),
        "M": num_m,
        "N": num_n,
        "K": rows.top_k,
        "FLIP": flip,
        "BM": tiles.bm,
        "BN": tiles.bn,
        "BK": tiles.bk,
        "GROUP": tiles.group,
        "P": p,
        "PIECES": rows.pieces,
        "SPLIT": tiles.split,
        "TMA": tiles.tma,
        "PREC": tiles.precision,
    }
    launch_weight_grad((p, 1, 1), args, constants, num_warps=tiles.warps, num_stages=tiles.stages)
    return out_E
