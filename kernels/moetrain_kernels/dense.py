"""silu(gate) * up of a dense or shared feed-forward layer, and its gradient: one pass over memory each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launcher, cdiv, interpreting, power_of_2

ELEMENTS = 2048  # of one program


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(
    gate_ptr, up_ptr, y_ptr, rows, gate_row, up_row, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """y [rows, F], contiguous; gate and up have their own distance from row to row."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (column < F)
    gate = tl.load(gate_ptr + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * F + column, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def swiglu_dense_grad_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    rows,
    gate_row,
    up_row,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of gate and up; all but gate and up themselves are contiguous."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (column < F)
    at = row * F + column
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dtype: tl.constexpr = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + at, (dy * up * (s + gate * s * (1.0 - s))).to(dtype), mask=inside)
    tl.store(dup_ptr + at, (dy * gate * s).to(dtype), mask=inside)


launch_swiglu = Launcher(swiglu_kernel)
launch_swiglu_grad = Launcher(swiglu_dense_grad_kernel)


class SwiGLU(torch.autograd.Function):
    """The launches behind `swiglu`, for [N, F] whose columns are side by side."""

    @staticmethod
    def forward(ctx, gate_NF, up_NF):
        rows, width = gate_NF.shape
        y_NF = torch.empty(rows, width, dtype=gate_NF.dtype, device=gate_NF.device)
        if y_NF.numel():
            grid, constants = _blocks(rows, width)
            args = (gate_NF, up_NF, y_NF, rows, gate_NF.stride(0), up_NF.stride(0))
            launch_swiglu(grid, args, constants, num_warps=4)
        ctx.save_for_backward(gate_NF, up_NF)
        return y_NF

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_NF):
        gate_NF, up_NF = ctx.saved_tensors
        rows, width = gate_NF.shape
        dgate_NF, dup_NF = (torch.empty_like(dy_NF, memory_format=torch.contiguous_format) for _ in range(2))
        if dy_NF.numel():
            grid, constants = _blocks(rows, width)
            args = (dy_NF.contiguous(), gate_NF, up_NF, dgate_NF, dup_NF, rows, gate_NF.stride(0), up_NF.stride(0))
            launch_swiglu_grad(grid, args, constants, num_warps=4)
        return dgate_NF, dup_NF


def _blocks(rows: int, width: int) -> tuple[tuple[int, int, int], dict]:
    block = min(ELEMENTS, power_of_2(width))
    block_rows = ELEMENTS // block
    grid = (cdiv(rows, block_rows), cdiv(width, block), 1)
    return grid, {"F": width, "ROWS": block_rows, "BLOCK": block}


@torch.compiler.disable
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of [..., F] of one shape and dtype: contiguous, in that dtype. Differentiable once.

    Raises ValueError for fp64 and for tensors that are not on a GPU.
    """
    if gate.dtype == torch.float64 or (gate.device.type != "cuda" and not interpreting()):
        raise ValueError(f"the SwiGLU kernel needs at most fp32 on a GPU; got {gate.dtype} on {gate.device}")
    rows = [t if t.stride(-1) == 1 else t.contiguous() for t in (gate, up)]
    return SwiGLU.apply(*(t.reshape(-1, t.shape[-1]) for t in rows)).view(gate.shape)
