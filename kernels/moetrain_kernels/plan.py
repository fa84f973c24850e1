"""Routing metadata, built on the device: slots sorted by expert, expert spans, and the table of row tiles.

A counting sort in three launches and no host synchronisation: per-block histogram, prefix over blocks, scatter. It is
stable (rows of one expert keep slot order), so everything computed from it repeats bit for bit. Comparison matrices are
summed over their first axis, which one thread holds: over the second, every sum crosses a warp and the matrix is kept.
Slots: S = T*K, slot = t*K + k. Rows: active slots in expert order. A tile is up to `block_m` rows of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import Launcher, cdiv, power_of_2

BLOCK_SLOTS = 128
TABLE_CELLS = 2**14  # of the [E, TABLE] comparisons that fill the tables
WARPS = BLOCK_SLOTS // 32  # a thread per slot
COUNTERS = {"up": 2, "down": 3, "down_grad": 4, "dx": 5}  # the entry of sizes_6 that a ring kernel draws its tiles from


@dataclass(frozen=True)
class RowPlan:
    """Where every row comes from and goes to. All tensors int32, on the device.

    slot_R [max_rows]        row -> slot; entries past the total are undefined
    row_TK [T, K]            slot -> row, -1 if the slot has none
    tiles_M3 [max_tiles, 3]  (expert, first row, end row of the expert) of each row tile
    spans_E3 [E, 3]          (expert, first row, end row), experts with most rows first
    sizes_6 [6]              (row tiles, rows) in use, then the four COUNTERS (see ws.take)
    """

    slot_R: torch.Tensor
    row_TK: torch.Tensor
    tiles_M3: torch.Tensor
    spans_E3: torch.Tensor
    sizes_6: torch.Tensor
    block_m: int

    @property
    def max_rows(self) -> int:
        return self.slot_R.numel()

    @property
    def top_k(self) -> int:
        return self.row_TK.shape[1]

    @property
    def num_experts(self) -> int:
        return self.spans_E3.shape[0]


@triton.jit
def _experts(expert_TK, slot, num_slots, base, K: tl.constexpr, STRIDE: tl.constexpr):
    """Experts of slots, counted from `base`; rows of `expert_TK` are STRIDE numbers apart."""
    at = slot if STRIDE == K else slot // K * STRIDE + slot % K
    expert = tl.load(expert_TK + at, mask=slot < num_slots, other=-1).to(tl.int32)
    return tl.where(expert < 0, -1, expert - base)


@triton.jit(do_not_specialize=["num_slots", "num_blocks", "base"])
def histogram_kernel(
    expert_TK,
    counts_EB,
    num_slots,
    num_blocks,
    base,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[e, b] = slots of block b that name expert e, counted by integer additions in shared memory."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = _experts(expert_TK, slot, num_slots, base, K, STRIDE)
    ids = tl.arange(0, E_POW2)
    count = tl.histogram(expert, E_POW2, mask=(expert >= 0) & (expert < E))
    tl.store(counts_EB + ids.to(tl.int64) * num_blocks + block, count, mask=ids < E)


@triton.jit(do_not_specialize=["num_blocks"])
def prefix_kernel(counts_EB, total_E, num_blocks, BLOCK: tl.constexpr):
    """Per expert, counts become exclusive prefixes over the blocks; the total goes to total_E."""
    expert = tl.program_id(0)
    carry = tl.full((), 0, tl.int32)
    for start in range(0, num_blocks, BLOCK):
        b = start + tl.arange(0, BLOCK)
        at = counts_EB + expert.to(tl.int64) * num_blocks + b
        count = tl.load(at, mask=b < num_blocks, other=0)
        tl.store(at, carry + tl.cumsum(count, axis=0) - count, mask=b < num_blocks)
        carry += tl.sum(count)
    tl.store(total_E + expert, carry)


@triton.jit
def _scatter_block(
    expert_TK,
    prefix_EB,
    count,
    slot_R,
    row_S,
    block,
    num_slots,
    num_blocks,
    max_rows,
    base,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    slot = block * BLOCK + i
    expert = _experts(expert_TK, slot, num_slots, base, K, STRIDE)
    used = (expert >= 0) & (expert < E)
    prefix = tl.load(prefix_EB + expert.to(tl.int64) * num_blocks + block, mask=used, other=0)
    # Rank among equals of this block: a comparison matrix, whose cost does not grow with the number of experts.
    earlier = (expert[:, None] == expert[None, :]) & (i[:, None] < i[None, :])
    rank = tl.sum(earlier.to(tl.int32), axis=0)
    first = tl.gather(tl.cumsum(count, axis=0) - count, tl.where(used, expert, 0), axis=0)
    row = first + prefix + rank
    used = used & (row < max_rows)
    tl.store(slot_R + row, slot, mask=used)
    tl.store(row_S + slot, tl.where(used, row, -1), mask=slot < num_slots)


@triton.jit
def _write_spans(
    total_E, count, ids, spans_E3, sizes_6, first, max_rows, E: tl.constexpr, BLOCK_M: tl.constexpr, TABLE: tl.constexpr
):
    e = first + tl.arange(0, TABLE)
    mine = tl.load(total_E + e, mask=e < E, other=0)
    start = tl.gather(tl.cumsum(count, axis=0) - count, tl.minimum(e, E - 1), axis=0)
    # The expert's place by descending count, ties by id: weight gradients start with the longest reductions.
    ahead = (count[:, None] > mine[None, :]) | ((count[:, None] == mine[None, :]) & (ids[:, None] < e[None, :]))
    place = tl.sum(ahead.to(tl.int32), axis=0)
    tl.store(spans_E3 + 3 * place, e, mask=e < E)
    tl.store(spans_E3 + 3 * place + 1, tl.minimum(start, max_rows), mask=e < E)
    tl.store(spans_E3 + 3 * place + 2, tl.minimum(start + mine, max_rows), mask=e < E)
    if first == 0:
        row_end = tl.minimum(tl.cumsum(count, axis=0), max_rows)
        rows = row_end - tl.minimum(tl.cumsum(count, axis=0) - count, max_rows)
        tl.store(sizes_6, tl.sum((rows + BLOCK_M - 1) // BLOCK_M))
        tl.store(sizes_6 + 1, tl.sum(rows))
        tl.store(sizes_6 + 2 + tl.arange(0, 4), tl.zeros((4,), tl.int32))


@triton.jit
def _write_tiles(
    count, tiles_M3, first_tile, max_rows, max_tiles, E: tl.constexpr, BLOCK_M: tl.constexpr, TABLE: tl.constexpr
):
    end = tl.minimum(tl.cumsum(count, axis=0), max_rows)
    start = tl.minimum(tl.cumsum(count, axis=0) - count, max_rows)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    tile_end = tl.cumsum(tiles, axis=0)
    t = first_tile + tl.arange(0, TABLE)
    expert = tl.sum((tile_end[:, None] <= t[None, :]).to(tl.int32), axis=0)
    live = (t < max_tiles) & (expert < E)
    known = tl.where(live, expert, 0)
    row0 = tl.gather(start - (tile_end - tiles) * BLOCK_M, known, axis=0)
    row_end = tl.gather(end, known, axis=0)
    tl.store(tiles_M3 + 3 * t, expert, mask=live)
    tl.store(tiles_M3 + 3 * t + 1, row0 + t * BLOCK_M, mask=live)
    tl.store(tiles_M3 + 3 * t + 2, row_end, mask=live)


@triton.jit(do_not_specialize=["num_slots", "num_blocks", "max_rows", "max_tiles", "base"])
def scatter_kernel(
    expert_TK,
    prefix_EB,
    total_E,
    slot_R,
    row_S,
    tiles_M3,
    spans_E3,
    sizes_6,
    num_slots,
    num_blocks,
    max_rows,
    max_tiles,
    base,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    TABLE: tl.constexpr,
):
    """First cdiv(E, TABLE) programs write spans and sizes, the next write the tile table, and `num_blocks` place slots.

    The tables' programs take longest, so they start first.
    """
    pid = tl.program_id(0)
    ids = tl.arange(0, E_POW2)
    count = tl.load(total_E + ids, mask=ids < E, other=0)
    span_programs = (E + TABLE - 1) // TABLE
    block = pid - (tl.num_programs(0) - num_blocks)
    if block >= 0:
        _scatter_block(
            expert_TK,
            prefix_EB,
            count,
            slot_R,
            row_S,
            block,
            num_slots,
            num_blocks,
            max_rows,
            base,
            K,
            STRIDE,
            E,
            BLOCK,
        )
    elif pid < span_programs:
        _write_spans(total_E, count, ids, spans_E3, sizes_6, pid * TABLE, max_rows, E, BLOCK_M, TABLE)
    else:
        first_tile = (pid - span_programs) * TABLE
        _write_tiles(count, tiles_M3, first_tile, max_rows, max_tiles, E, BLOCK_M, TABLE)


launch_histogram = Launcher(histogram_kernel)
launch_prefix = Launcher(prefix_kernel)
launch_scatter = Launcher(scatter_kernel)


def sort_rows(
    expert_TK: torch.Tensor, num_experts: int, block_m: int, max_rows: int | None = None, base: int = 0
) -> RowPlan:
    """Build the plan. `max_rows` is a promise (default T*K): rows past it are dropped, never written out of bounds.

    expert_TK: whole numbers of any dtype; experts are counted from `base`.
    """
    num_slots = expert_TK.numel()
    rows = num_slots if max_rows is None else min(max_rows, num_slots)
    num_blocks = cdiv(num_slots, BLOCK_SLOTS)
    max_tiles = rows // block_m + min(num_experts, rows)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=expert_TK.device)

    plan = RowPlan(empty(rows), empty(*expert_TK.shape), empty(max_tiles, 3), empty(num_experts, 3), empty(6), block_m)
    if num_slots == 0:
        return plan
    counts_EB, total_E = empty(num_experts, num_blocks), empty(num_experts)
    e_pow2 = max(BLOCK_SLOTS, power_of_2(num_experts))  # no fewer than threads: Triton need not copy any
    if expert_TK.stride(1) != 1:
        expert_TK = expert_TK.contiguous()
    sizes = {"K": expert_TK.shape[1], "STRIDE": expert_TK.stride(0), "E": num_experts, "E_POW2": e_pow2}
    launch_histogram(
        (num_blocks, 1, 1),
        (expert_TK, counts_EB, num_slots, num_blocks, base),
        {**sizes, "BLOCK": BLOCK_SLOTS},
        num_warps=WARPS,
    )
    args = (counts_EB, total_E, num_blocks)
    launch_prefix((num_experts, 1, 1), args, {"BLOCK": min(2048, power_of_2(num_blocks))}, num_warps=4)
    table = max(1, min(32, TABLE_CELLS // e_pow2))
    programs = cdiv(num_experts, table) + cdiv(max_tiles, table) + num_blocks
    outputs = (plan.slot_R, plan.row_TK, plan.tiles_M3, plan.spans_E3, plan.sizes_6)
    launch_scatter(
        (programs, 1, 1),
        (expert_TK, counts_EB, total_E, *outputs, num_slots, num_blocks, rows, max_tiles, base),
        {**sizes, "BLOCK_M": block_m, "BLOCK": BLOCK_SLOTS, "TABLE": table},
        num_warps=WARPS,
    )
    return plan
