"""Warp-specialised Hopper kernel of the down-projection's gradient, with the backward of SwiGLU in its epilogue."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma

from .gemm_ws import locate
from .launch import Launcher, Ring, cdiv, launch_ring
from .plan import COUNTERS, RowPlan
from .swiglu_grad import TAIL_ROWS
from .ws import (
    FLAT,
    HALF,
    column_part,
    gathered,
    hear,
    logistic,
    make_barriers,
    make_box,
    multiply,
    next_stage,
    pass_over,
    ragged_desc,
    ring_desc,
    stage_before,
    store_rows,
    take,
    tell,
)


@gluon.jit
def _produce(
    dy_ptr,
    w_desc,
    h_desc,
    slot_R,
    tiles_M3,
    num_m,
    counter,
    box,
    told,
    heard,
    dy_ring,
    w_ring,
    up_ring,
    full,
    empty,
    F: gl.constexpr,
    D: gl.constexpr,
    K: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    P: gl.constexpr,
    STAGES: gl.constexpr,
):
    N_TILES: gl.constexpr = (F + BN - 1) // BN
    BM: gl.constexpr = 2 * HALF
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    tile, round = gl.program_id(0), 0
    while tile < num_m * N_TILES:
        n, expert, row, end = locate(tile, num_m, tiles_M3, N_TILES, GROUP)
        tell(box, told, heard, round, n, row, end)
        following = tile + P
        at, used = gathered(dy_ptr, slot_R, row, end, D, K, BK)
        for k in range(D // BK):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, BN * BK * 2)
            tma.async_copy_global_to_shared(w_desc, [expert * D + k * BK, n * BN], ready, w_ring.index(stage))
            async_copy.async_copy_global_to_shared(dy_ring.index(stage), at + k * BK, used)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)
            if k == D // BK // 2:  # the ring is full by now, which hides the counter's latency
                following = take(counter, num_m * N_TILES, P)
        for i in range(BN // BK):  # H follows as if it were operands: its latency is hidden as theirs is
            mbarrier.wait(empty.index(stage), phase ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, 2 * BM * BK * 2)
            col = n * BN + i * BK
            tma.async_copy_global_to_shared(h_desc, [row, col], ready, dy_ring.index(stage))
            tma.async_copy_global_to_shared(h_desc, [row, F + col], ready, up_ring.index(2 * stage))
            async_copy.mbarrier_arrive(ready, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)
        tile, round = following, round + 1
    tell(box, told, heard, round, 0, 0, 0)


@gluon.jit
def _consume(
    dh_desc,
    a_desc,
    gate_S,
    part_ptr,
    slot_R,
    box,
    told,
    heard,
    dy_halves,
    w_ring,
    w_halves,
    dy_view,
    w_view,
    full,
    empty,
    part: gl.constexpr,
    F: gl.constexpr,
    D: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    N_TILES: gl.constexpr = (F + BN - 1) // BN
    K_TILES: gl.constexpr = D // BK
    PARTS: gl.constexpr = BN // BK
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BK, 16])
    dtype: gl.constexpr = dh_desc.dtype
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    round = 0
    n, row, end = hear(box, told, heard, round)
    while end > 0:
        row += part * HALF
        if row < end:
            rows = row + gl.arange(0, HALF, layout=gl.SliceLayout(1, PART))
            slot = gl.load(slot_R + rows, mask=rows < end, other=0)
            gate = gl.load(gate_S + slot, mask=rows < end, other=0.0).to(gl.float32)
            acc = gl.zeros([HALF, BN], gl.float32, ACC)
            acc, stage, phase = multiply(
                dy_halves, w_ring, full, empty, acc, stage, phase, K_TILES, part, False, False, True, STAGES
            )
            dgate = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, PART))
            for i in gl.static_range(PARTS):  # the results take H's place in the ring and leave from there
                mbarrier.wait(full.index(stage), phase)
                gate_at, up_at = dy_halves.index(2 * stage + part), w_halves.index(4 * stage + part)
                g = gate_at.load(PART).to(gl.float32)
                u = up_at.load(PART).to(gl.float32)
                b = gl.convert_layout(column_part(acc, i, PARTS, HALF, BN), PART)
                s = logistic(g)
                silu = g * s
                act = silu * u
                dgate += gl.sum(b * act, axis=1)
                da = b * gate[:, None]
                gate_at.store((da * u * (s + silu * (1.0 - s))).to(dtype))
                up_at.store((da * silu).to(dtype))
                w_halves.index(4 * stage + 2 + part).store((act * gate[:, None]).to(dtype))
                fence_async_shared()
                col = n * BN + i * BK
                store_rows(a_desc, w_view.index(4 * stage + 2 + part), row, end, 0, col)
                store_rows(dh_desc, dy_view.index(2 * stage + part), row, end, 0, col)
                store_rows(dh_desc, w_view.index(4 * stage + part), row, end, 1, col)
                if i > 0:
                    tma.store_wait(3)  # this part's stores may still read
                    mbarrier.arrive(empty.index(stage_before(stage, STAGES)), count=1)
                stage, phase = next_stage(stage, phase, STAGES)
            tma.store_wait(0)
            mbarrier.arrive(empty.index(stage_before(stage, STAGES)), count=1)
            gl.store(part_ptr + rows.to(gl.int64) * N_TILES + n, dgate, mask=rows < end)
        else:
            stage, phase = pass_over(full, empty, stage, phase, K_TILES + PARTS, STAGES)
        round += 1
        n, row, end = hear(box, told, heard, round)


@gluon.jit
def _zero_tail(ptr, sizes_6, num_rows, WIDTH: gl.constexpr, TAIL: gl.constexpr, P: gl.constexpr):
    """Zero the TAIL rows past the last one in use, where they exist: a weight gradient's last block reads them."""
    BLOCK: gl.constexpr = 1024
    total = gl.load(sizes_6 + 1)
    cols = gl.arange(0, BLOCK, layout=gl.BlockedLayout([8], [32], [gl.num_warps()], [0]))
    zero = gl.zeros([BLOCK], ptr.dtype.element_ty, gl.BlockedLayout([8], [32], [gl.num_warps()], [0]))
    for row in range(total + gl.program_id(0), gl.minimum(total + TAIL, num_rows), P):
        for col in range(0, WIDTH, BLOCK):
            gl.store(ptr + row.to(gl.int64) * WIDTH + col + cols, zero, mask=col + cols < WIDTH)


@gluon.jit(do_not_specialize=["num_rows"])
def down_grad_ws_kernel(
    dy_ptr,
    w_desc,
    h_desc,
    dh_desc,
    dh_ptr,
    a_desc,
    a_ptr,
    gate_S,
    part_ptr,
    slot_R,
    tiles_M3,
    sizes_6,
    num_rows,
    F: gl.constexpr,
    D: gl.constexpr,
    K: gl.constexpr,
    COUNTER: gl.constexpr,
    TAIL: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    P: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER_REGS: gl.constexpr,
    CONSUMER_REGS: gl.constexpr,
):
    """b = dy[token] @ w_down, never stored; from it and H: dh, gate * act, and per column tile part = <b, act>."""
    BM: gl.constexpr = 2 * HALF
    dtype: gl.constexpr = dh_desc.dtype
    _zero_tail(dh_ptr, sizes_6, num_rows, 2 * F, TAIL, P)
    _zero_tail(a_ptr, sizes_6, num_rows, F, TAIL, P)
    num_m = gl.load(sizes_6)
    box, told, heard = make_box()
    full, empty = make_barriers(STAGES, 1 + 128)
    dy_ring = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], FLAT)
    dy_halves = dy_ring._reinterpret(dtype, [2 * STAGES, HALF, BK], FLAT)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES, BK, BN], FLAT)
    up_ring = w_ring._reinterpret(dtype, [2 * STAGES, BM, BK], FLAT)  # half of a weight stage
    w_halves = w_ring._reinterpret(dtype, [4 * STAGES, HALF, BK], FLAT)
    dy_view = dy_ring._reinterpret(dtype, [2 * STAGES, 1, 1, HALF, 1, BK], dh_desc.layout)
    w_view = w_ring._reinterpret(dtype, [4 * STAGES, 1, 1, HALF, 1, BK], dh_desc.layout)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (dh_desc, a_desc, gate_S, part_ptr, slot_R, box, told, heard, dy_halves, w_ring, w_halves,
                        dy_view, w_view, full, empty, 0, F, D, BN, BK, STAGES)),
            (_consume, (dh_desc, a_desc, gate_S, part_ptr, slot_R, box, told, heard, dy_halves, w_ring, w_halves,
                        dy_view, w_view, full, empty, 1, F, D, BN, BK, STAGES)),
            (_produce, (dy_ptr, w_desc, h_desc, slot_R, tiles_M3, num_m, sizes_6 + COUNTER, box, told, heard,
                        dy_ring, w_ring, up_ring, full, empty,
                        F, D, K, BN, BK, GROUP, P, STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGS, PRODUCER_REGS],
    )
    # fmt: on


launch_down_grad = Launcher(down_grad_ws_kernel)


def down_grad_ws(
    dy_TD: torch.Tensor,
    gate_TK: torch.Tensor,
    plan: RowPlan,
    w_down_EDF: torch.Tensor,
    h_R2F: torch.Tensor,
    ring: Ring,
    dh_R2F: torch.Tensor,
    a_RF: torch.Tensor,
) -> torch.Tensor:
    """Fill `dh_R2F` and `a_RF` (times gate); return `part_RP` (fp32) with sum dgate. 64 divides D; BN // BK is 4."""
    rows, (_, num_d, num_f) = plan.max_rows, w_down_EDF.shape
    num_n = cdiv(num_f, ring.bn)
    part_RP = torch.empty(rows, num_n, dtype=torch.float32, device=h_R2F.device)
    args = (
        dy_TD,
        ring_desc(w_down_EDF.view(-1, num_f), (ring.bk, ring.bn)),
        ring_desc(h_R2F, (128, ring.bk)),
        ragged_desc(dh_R2F.view(rows, 2, num_f), (64, ring.bk)),
        dh_R2F,
        ragged_desc(a_RF.view(rows, 1, num_f), (64, ring.bk)),
        a_RF,
        gate_TK,
        part_RP,
        plan.slot_R,
        plan.tiles_M3,
        plan.sizes_6,
        rows,
    )
    constants = {"F": num_f, "D": num_d, "K": plan.top_k, "COUNTER": COUNTERS["down_grad"], "TAIL": TAIL_ROWS}
    launch_ring(launch_down_grad, ring, args, constants, (72, 216))
    return part_RP
