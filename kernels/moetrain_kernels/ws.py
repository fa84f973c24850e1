"""Device helpers of the warp-specialised Hopper kernels: the ring of operand buffers, gathering, and storing tiles.

One producer partition fills a ring of shared-memory stages (TMA, or cp.async for gathered rows); two consumer
warpgroups, 64 rows of the tile each, multiply from it and store through staging buffers of their own. They meet only at
the barriers `full` (a stage has arrived) and `empty` (both consumers have finished with it), so that one warpgroup's
epilogue runs while the other still multiplies, and the loads never stop.
"""

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

RAGGED = gl.constexpr(1 << 30)
HALF = gl.constexpr(64)  # rows of a consumer: the height of one wgmma
FLAT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The ring's next stage; the phase flips when the ring wraps."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def stage_before(stage, STAGES: gl.constexpr):
    """Computed, not carried: Triton 3.6 takes a loop's `before = stage` for a constant."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def make_barriers(STAGES: gl.constexpr, FULL_COUNT: gl.constexpr):
    """(full, empty): `full` completes after FULL_COUNT arrivals and the announced bytes, `empty` after 2 arrivals."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=FULL_COUNT)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    return full, empty


@gluon.jit
def make_box():
    """(box, told, heard): two places where the producer leaves a tile for the two consumers."""
    told = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(told.index(i), count=1)
        mbarrier.init(heard.index(i), count=2)
    fence_async_shared()
    return gl.allocate_shared_memory(gl.int32, [2, 4], gl.SwizzledSharedLayout(1, 1, 1, [0])), told, heard


@gluon.jit
def tell(box, told, heard, round, n, row, end):
    """Producer: leave the column tile, first row and end row of a round; an end of 0 says that there are no more."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    place = round % 2
    mbarrier.wait(heard.index(place), (round // 2 % 2) ^ 1)
    i = gl.arange(0, 4, layout=LAYOUT)
    box.index(place).store(gl.where(i == 0, n, gl.where(i == 1, row, end)))
    mbarrier.arrive(told.index(place), count=1)


@gluon.jit
def hear(box, told, heard, round):
    """Consumer: column tile, first row and end row of a round."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    place = round % 2
    mbarrier.wait(told.index(place), round // 2 % 2)
    value = box.index(place).load(LAYOUT)
    mbarrier.arrive(heard.index(place), count=1)
    value = gl.inline_asm_elementwise(  # tells the compiler that it is one value for the warp
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [value], dtype=gl.int32, is_pure=True, pack=1
    )
    i = gl.arange(0, 4, layout=LAYOUT)
    n, row = gl.sum(gl.where(i == 0, value, 0), axis=0), gl.sum(gl.where(i == 1, value, 0), axis=0)
    return n, row, gl.sum(gl.where(i == 2, value, 0), axis=0)


@gluon.jit
def take(counter, tiles, P: gl.constexpr):
    """The next tile of a launch of P programs, `tiles` or more if none is left; the first P tiles are given by number.

    A launch draws exactly `tiles` tickets, one of them in vain for each program that had a tile, so the counter is a
    multiple of `tiles` when the next launch begins and need not be reset. Launches on one counter must have the same
    `tiles` and must not overlap in time; P may differ.
    """
    return P + gl.atomic_add(counter, 1, sem="relaxed") % tiles


@gluon.jit
def gathered(ptr, slot_R, row, end, C: gl.constexpr, K: gl.constexpr, BK: gl.constexpr):
    """Addresses of the first BK columns of a row tile's tokens, `ptr` being [T, C], and which rows are below `end`.

    Others must not be loaded: all of them are one token's, whose memory would serve every multiprocessor at once.
    """
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (BK // 8), BK // 8], [gl.num_warps(), 1], [1, 0])
    rows = row + gl.arange(0, 2 * HALF, layout=gl.SliceLayout(1, LOAD))
    used = rows < end
    token = gl.load(slot_R + rows, mask=used, other=0) // K
    cols = gl.arange(0, BK, layout=gl.SliceLayout(0, LOAD))
    return ptr + token.to(gl.int64)[:, None] * C + cols[None, :], used[:, None]


@gluon.jit
def logistic(x):
    """1 / (1 + exp(-x)), by the hardware's tanh."""
    half_tanh = gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=gl.float32, is_pure=True, pack=1
    )
    return 0.5 * half_tanh + 0.5


@gluon.jit
def halves(x, ROWS: gl.constexpr, COLS: gl.constexpr):
    """Left and right half of a [ROWS, COLS] block's columns; moves no data between threads."""
    return x.reshape([ROWS, 2, COLS // 2]).permute([0, 2, 1]).split()


@gluon.jit
def column_part(x, i: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr):
    """Columns [i, i + 1) * COLS / PARTS of a [ROWS, COLS] block, PARTS being 1, 2 or 4."""
    if PARTS == 1:
        part = x
    else:
        left, right = halves(x, ROWS, COLS)
        half = left if i < PARTS // 2 else right
        if PARTS == 2:
            part = half
        else:
            first, second = halves(half, ROWS, COLS // 2)
            part = first if i % 2 == 0 else second
    return part


@gluon.jit
def multiply(
    left,
    right,
    full,
    empty,
    acc,
    stage,
    phase,
    steps,
    part: gl.constexpr,
    LEFT_T: gl.constexpr,
    RIGHT_T: gl.constexpr,
    GATHER: gl.constexpr,
    STAGES: gl.constexpr,
):
    """acc plus `steps` stages of the ring, one product always in flight. Returns acc and the ring's position.

    cp.async writes shared memory as ordinary stores do, wgmma reads it through the asynchronous proxy: with GATHER a
    fence stands between them.
    """
    for k in range(steps):
        mbarrier.wait(full.index(stage), phase)
        if GATHER:
            fence_async_shared()
        a = left.index(2 * stage + part)
        b = right.index(stage)
        if LEFT_T:
            a = a.permute([1, 0])
        if RIGHT_T:
            b = b.permute([1, 0])
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index(stage_before(stage, STAGES)), count=1, pred=k > 0)
        stage, phase = next_stage(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(stage_before(stage, STAGES)), count=1, pred=steps > 0)
    return acc, stage, phase


@gluon.jit
def pass_over(full, empty, stage, phase, steps, STAGES: gl.constexpr):
    """Take part in `steps` stages without reading them (no row of this consumer's half is in use)."""
    for _ in range(steps):
        mbarrier.wait(full.index(stage), phase)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def store_rows(desc, source, row, end, half, col):
    """Start a store from shared memory to [row, half, col] of a [rows, halves, columns] tensor, only rows below `end`.

    `desc` has two more dimensions in front, of stride 2^34 - s and s for rows of s bytes: since addresses wrap at 2^64,
    the row coordinate can be shifted so that `end` falls on the row dimension's bound, 2^30, where TMA stops.
    """
    tma.async_copy_shared_to_global(desc, [RAGGED, end, RAGGED - (end - row), half, col], source)


@gluon.jit
def stage_out(value, staging, view, base: gl.constexpr, turn, FLIP: gl.constexpr, BUFS: gl.constexpr):
    """Put a block of registers, transposed with FLIP, into the consumer's staging buffer whose turn it is.

    Returns the buffer as a store's source, and the next turn.
    """
    tma.store_wait(BUFS - 1)
    buffer = staging.index(base + turn)
    if FLIP:
        buffer = buffer.permute([1, 0])
    buffer.store(value)
    fence_async_shared()
    source = view.index(base + turn)
    if BUFS > 1:
        turn = gl.where(turn == BUFS - 1, 0, turn + 1)
    return source, turn


@gluon.jit
def put_rows(desc, value, staging, view, base: gl.constexpr, turn, row, end, half, col, BUFS: gl.constexpr):
    """store_rows of a block of registers; returns the next turn."""
    source, turn = stage_out(value, staging, view, base, turn, False, BUFS)
    store_rows(desc, source, row, end, half, col)
    return turn


@cache
def _layout(rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def _desc(tensor: torch.Tensor, shape: list[int], strides: list[int], block: tuple[int, ...]) -> TensorDescriptor:
    """A TMA descriptor, without the constructor's checks (see launch.block_desc)."""
    desc = object.__new__(TensorDescriptor)
    desc.__dict__.update(
        base=tensor,
        shape=shape,
        strides=strides,
        block_shape=list(block),
        layout=_layout(len(block)),
        padding="zero",
        round_f32_to_tf32=False,
    )
    return desc


def ring_desc(tensor: torch.Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """Descriptor of a contiguous 16-bit tensor for blocks in 128-byte swizzled shared memory."""
    return _desc(tensor, list(tensor.shape), list(tensor.stride()), block)


def ragged_desc(out_RHN: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """Descriptor of [rows, halves, columns] for put_rows, with blocks of (rows, columns)."""
    stride = out_RHN.stride(0)
    shape = [2**31 - 2**16, 2**31 - 2**16, 2**30, out_RHN.shape[1], out_RHN.shape[2]]
    strides = [2**34 - stride, stride, stride, out_RHN.stride(1), 1]
    return _desc(out_RHN, shape, strides, (1, 1, block[0], 1, block[1]))
