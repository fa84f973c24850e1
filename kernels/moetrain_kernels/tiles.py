"""Device helpers shared by the grouped kernels: finding a tile, and moving a block by TMA or by pointers.

Every helper takes both a descriptor and a pointer (the same tensor twice where TMA is not used) and a constexpr TMA.
TMA loads read zeros outside the tensor; the pointer form masks to the same effect. Only stores know where an expert's
rows end: a load that runs into the next expert's rows feeds accumulator rows that are never stored.
"""

import triton
import triton.language as tl


@triton.jit
def locate_tile(tile, num_m, tiles_M3, N_TILES: tl.constexpr, GROUP: tl.constexpr):
    """(column tile, expert, first row, end row) of a flat tile number: GROUP row tiles share weight columns in L2."""
    per_group: tl.constexpr = GROUP * N_TILES
    first = tile // per_group * GROUP
    size = tl.minimum(num_m - first, GROUP)
    inside = tile % per_group
    m = first + inside % size
    return inside // size, tl.load(tiles_M3 + 3 * m), tl.load(tiles_M3 + 3 * m + 1), tl.load(tiles_M3 + 3 * m + 2)


@triton.jit
def load_tokens(slot_R, row, end, K: tl.constexpr, BLOCK: tl.constexpr):
    """Token of each of BLOCK rows; rows at or past `end` read token 0."""
    rows = row + tl.arange(0, BLOCK)
    return tl.load(slot_R + rows, mask=rows < end, other=0) // K


@triton.jit
def gather_rows(x_ptr, token, col, N: tl.constexpr, BLOCK: tl.constexpr):
    """[tokens, BLOCK] block of x starting at column `col`; columns past N read zero."""
    cols = col + tl.arange(0, BLOCK)
    at = x_ptr + token.to(tl.int64)[:, None] * N + cols[None, :]
    if N % BLOCK == 0:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(cols < N)[None, :], other=0.0)
    return x


@triton.jit
def load_block(desc, ptr, row, col, num_rows, N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
               TMA: tl.constexpr):
    """[ROWS, COLS] block of a row-major [num_rows, N] matrix."""
    if TMA:
        x = desc.load([row, col])
    else:
        rows = row + tl.arange(0, ROWS)
        cols = col + tl.arange(0, COLS)
        mask = (rows < num_rows)[:, None] & (cols < N)[None, :]
        x = tl.load(ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], mask=mask, other=0.0)
    return x


@triton.jit
def store_block(desc, ptr, value, row, end, half: tl.constexpr, col, H: tl.constexpr, N: tl.constexpr,
                ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """Store [ROWS, COLS] at [row, half, col] of a [_, H, N] tensor: only rows below `end` and columns below N.

    A tile that an expert's end cuts short goes by masked pointers, since TMA would overwrite the next expert's rows.
    `desc` has block [ROWS, 1, COLS]; equal blocks let the compiler share one staging buffer between tensors.
    """
    if TMA and row + ROWS <= end:
        desc.store([row, half, col], value.reshape(ROWS, 1, COLS))
    else:
        rows = row + tl.arange(0, ROWS)
        cols = col + tl.arange(0, COLS)
        mask = (rows < end)[:, None] & (cols < N)[None, :]
        tl.store(ptr + rows.to(tl.int64)[:, None] * (H * N) + half * N + cols[None, :], value, mask=mask)


@triton.jit
def halves(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Left and right half of a [ROWS, COLS] block's columns; moves no data between threads."""
    return x.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()


@triton.jit
def column_part(x, i: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Columns [i, i + 1) * COLS / SPLIT of a [ROWS, COLS] block, SPLIT being 1, 2 or 4."""
    if SPLIT == 1:
        part = x
    else:
        left, right = halves(x, ROWS, COLS)
        half = left if i < SPLIT // 2 else right
        if SPLIT == 2:
            part = half
        else:
            first, second = halves(half, ROWS, COLS // 2)
            part = first if i % 2 == 0 else second
    return part


@triton.jit
def sigmoid(x, PREC: tl.constexpr):
    """Logistic function; unless PREC is "ieee", by one approximate tanh (relative error 2^-11, well under bf16's)."""
    if PREC == "ieee":
        y = tl.sigmoid(x)
    else:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True,
                                      pack=1)
        y = 0.5 * t + 0.5
    return y
