"""The expert layer as one differentiable function: sort, up, down, combine, and their backward.

Kept for backward: x as it came (not gathered), the pre-activation H [rows, 2F], and the plan's few integers per row.
Gathered x, the activation, and the experts' un-combined output are recomputed or never needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache

import torch

from .combine import combine
from .configs import Config, choose
from .down_grad import down_grad
from .gemm import grouped_gemm
from .launch import interpreting
from .plan import RowPlan, sort_rows
from .spans import one_piece
from .up import up_swiglu
from .weight_grad import weight_grad

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(x_TD, expert_TK, gate_TK, w_gate_up_E2FD, w_down_EDF, max_rows) -> None:
    """ValueError naming the argument that does not fit."""
    num_experts, num_d, num_f = w_down_EDF.shape if w_down_EDF.dim() == 3 else (0, 0, 0)
    if x_TD.dim() != 2 or x_TD.shape[1] != num_d:
        raise ValueError(f"x must be [T, D] and w_down [E, D, F]; got {tuple(x_TD.shape)}, {tuple(w_down_EDF.shape)}")
    if tuple(w_gate_up_E2FD.shape) != (num_experts, 2, num_f, num_d):
        expected = (num_experts, 2, num_f, num_d)
        raise ValueError(f"w_gate_up must be [E, 2, F, D] = {expected}; got {tuple(w_gate_up_E2FD.shape)}")
    if expert_TK.dim() != 2 or expert_TK.shape[0] != x_TD.shape[0] or gate_TK.shape != expert_TK.shape:
        raise ValueError(f"expert and gate must be [T, K]; got {tuple(expert_TK.shape)}, {tuple(gate_TK.shape)}")
    if not (x_TD.dtype == w_gate_up_E2FD.dtype == w_down_EDF.dtype) or x_TD.dtype not in DTYPES:
        raise ValueError(f"x and weights must share one of fp32, fp16, bf16; got {x_TD.dtype}, {w_down_EDF.dtype}")
    if x_TD.device.type != "cuda" and not interpreting():
        raise ValueError(f"the kernels need a CUDA tensor; x is on {x_TD.device}")
    if max_rows is not None and max_rows < 0:
        raise ValueError(f"max_rows must not be negative; got {max_rows}")
    if expert_TK.numel() >= 2**31:
        raise ValueError("more than 2^31 slots in one call")


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """The rows, contiguous and at a multiple of 16 bytes: elsewhere, 2-byte loads would not pipeline."""
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


@contextmanager
def beside(device: torch.device | None) -> Iterator[Callable[[], None]]:
    """What is launched inside goes to a stream of higher priority, behind all work so far; what the usual stream gets
    afterwards fills the multiprocessors that it leaves. Call what this gives to have the usual stream wait for it.

    On a CPU, and for None, there is no other stream.
    """
    if device is None or device.type != "cuda":
        yield lambda: None
        return
    side, usual = _side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(usual)
    with torch.cuda.stream(side):
        yield lambda: usual.wait_stream(side)


def forward(
    x_TD: torch.Tensor,
    plan: RowPlan,
    gate_TK: torch.Tensor,
    w_gate_up_E2FD: torch.Tensor,
    w_down_EDF: torch.Tensor,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`y_TD` and the pre-activation `h_R2F`."""
    h_R2F, a_RF = up_swiglu(x_TD, plan, w_gate_up_E2FD, config.up)
    y_RD = grouped_gemm(a_RF, plan, w_down_EDF, config.down)
    return combine(y_RD, plan, gate_TK), h_R2F


def backward(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    plan: RowPlan,
    gate_TK: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    h_R2F: torch.Tensor,
    config: Config,
    need: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, gate, w_gate_up, w_down; `need` says which of (x or gate, w_gate_up, w_down) to compute.

    Those of the weights come from a stream beside dx's combine, which is bound by memory as they are not.
    """
    w_gate_up_E2FD, w_down_EDF = weights
    num_experts, _, num_f, num_d = w_gate_up_E2FD.shape
    dx_TD = dgate_TK = dw_gate_up_E2FD = dw_down_EDF = None
    dh_R2F, a_RF, part_RP = down_grad(dy_TD, gate_TK, plan, w_down_EDF, h_R2F, config.down_grad)
    rows, w_up_rows = one_piece(plan), w_gate_up_E2FD.view(num_experts, 2 * num_f, num_d)
    if need[0]:
        dgate_TK = torch.empty_like(gate_TK)
        dx_RD = grouped_gemm(dh_R2F, plan, w_up_rows, config.dx, transposed=True)
    if need[1]:
        dw_gate_up_E2FD = torch.empty_like(w_gate_up_E2FD)
    if need[2]:
        dw_down_EDF = torch.empty_like(w_down_EDF)
    with beside(x_TD.device if need[0] and (need[1] or need[2]) else None) as join:
        if need[1]:
            weight_grad(x_TD, dh_R2F, rows, dw_gate_up_E2FD.view_as(w_up_rows), True, config.dw_up)
        if need[2]:
            weight_grad(dy_TD, a_RF, rows, dw_down_EDF, False, config.dw_down)
    try:
        if need[0]:
            dx_TD = combine(dx_RD, plan, part_RP=part_RP, dgate_TK=dgate_TK)
    finally:
        join()  # before any tensor of here is freed: the allocator knows of the usual stream only
    return dx_TD, dgate_TK, dw_gate_up_E2FD, dw_down_EDF


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, expert_TK, gate_TK, w_gate_up_E2FD, w_down_EDF, max_rows):
        rows = expert_TK.numel() if max_rows is None else min(max_rows, expert_TK.numel())
        config = choose(x_TD, w_gate_up_E2FD, w_down_EDF, rows)
        ctx.empty = rows == 0 or w_down_EDF.numel() == 0
        if ctx.empty:
            ctx.save_for_backward(x_TD, gate_TK, w_gate_up_E2FD, w_down_EDF)
            return torch.zeros_like(x_TD)
        plan = sort_rows(expert_TK, w_down_EDF.shape[0], config.block_m, rows)
        y_TD, h_R2F = forward(x_TD, plan, gate_TK, w_gate_up_E2FD, w_down_EDF, config)
        plan_tensors = [getattr(plan, f.name) for f in fields(plan) if f.name != "block_m"]
        ctx.save_for_backward(x_TD, gate_TK, w_gate_up_E2FD, w_down_EDF, h_R2F, *plan_tensors)
        ctx.config = config
        return y_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_TD):
        need = ctx.needs_input_grad
        if ctx.empty:
            x, gate, w_up, w_down = (torch.zeros_like(t) for t in ctx.saved_tensors)
            return x, None, gate, w_up, w_down, None
        x_TD, gate_TK, w_gate_up_E2FD, w_down_EDF, h_R2F, *plan_tensors = ctx.saved_tensors
        plan = RowPlan(*plan_tensors, ctx.config.block_m)
        dy_TD = aligned(dy_TD)
        dx, dgate, dw_up, dw_down = backward(
            dy_TD,
            x_TD,
            plan,
            gate_TK,
            (w_gate_up_E2FD, w_down_EDF),
            h_R2F,
            ctx.config,
            (need[0] or need[2], need[3], need[4]),
        )
        return dx, None, dgate, dw_up, dw_down, None


@torch.compiler.disable
def moe_experts(
    x_TD: torch.Tensor,
    expert_TK: torch.Tensor,
    gate_TK: torch.Tensor,
    w_gate_up_E2FD: torch.Tensor,
    w_down_EDF: torch.Tensor,
    *,
    max_rows: int | None = None,
) -> torch.Tensor:
    """y_t = sum over slots k of gate[t, k] * down_e(silu(gate_e x_t) * up_e x_t), e = expert[t, k].

    x [T, D]; expert [T, K] local ids, anything outside [0, E) marks an unused slot (no output, zero gate gradient);
    gate [T, K] any floating dtype; w_gate_up [E, 2, F, D] (gate, then up); w_down [E, D, F]; y [T, D] in x's dtype.
    Differentiable once in x, gate and both weights. Nothing waits for the device. `max_rows` bounds the active slots
    and so the buffers (default T*K); slots past a bound that is too small are dropped. Atomics do nothing but
    count, so results always repeat bit for bit.
    """
    check(x_TD, expert_TK, gate_TK, w_gate_up_E2FD, w_down_EDF, max_rows)
    if expert_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert must be int32 or int64; got {expert_TK.dtype}")
    return _Experts.apply(
        x_TD.contiguous(),
        expert_TK.contiguous(),
        gate_TK.contiguous(),
        w_gate_up_E2FD.contiguous(),
        w_down_EDF.contiguous(),
        max_rows,
    )
