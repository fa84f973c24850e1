"""RMS norm, with the residual sum before it: each row is read once and written once, each way.

All arithmetic is fp32, of the sum as it is stored. Kept for the backward pass: that sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launcher, device_traits, interpreting, power_of_2

WIDEST = 16384  # a row is held in registers
PROGRAMS = 8  # of the backward pass, on each multiprocessor


@triton.jit
def rms_norm_kernel(
    x_ptr, delta_ptr, weight_D, sum_ptr, y_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    """y = rms_norm(x + delta) * weight for one row; with ADD the sum is stored too."""
    at = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK)
    inside = d < D
    x = tl.load(x_ptr + at + d, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + at + d, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at + d, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    y = x * scale * tl.load(weight_D + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at + d, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_grad_kernel(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    weight_D,
    dx_ptr,
    part_PD,
    rows,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """dx of every `programs`-th row, with ADD plus the sum's own gradient, and this program's part of the weight's."""
    d = tl.arange(0, BLOCK)
    inside = d < D
    weight = tl.load(weight_D + d, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = (row + tl.arange(0, 1)).to(tl.int64) * D
        x = tl.load(x_ptr + at + d, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at + d, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
        normed = x * scale
        dweight += dy * normed
        dy *= weight
        dx = (dy - normed * (tl.sum(dy * normed, axis=0) / D)) * scale
        if ADD:
            dx += tl.load(dsum_ptr + at + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at + d, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(part_PD + tl.program_id(0).to(tl.int64) * D + d, dweight, mask=inside)


launch_rms_norm = Launcher(rms_norm_kernel)
launch_rms_norm_grad = Launcher(rms_norm_grad_kernel)


class RMSNorm(torch.autograd.Function):
    """The launches behind `rms_norm` and `add_rms_norm`. delta None: no sum."""

    @staticmethod
    def forward(ctx, x, delta, weight_D, eps):
        ctx.set_materialize_grads(False)
        ctx.add, ctx.eps = delta is not None, float(eps)
        x = x.contiguous()
        delta = x if delta is None else delta.contiguous()
        total = torch.empty_like(x) if ctx.add else x
        y = torch.empty_like(x)
        rows = x.numel() // x.shape[-1]
        if rows:
            args = (x, delta, weight_D, total, y, ctx.eps)
            launch_rms_norm((rows, 1, 1), args, _constants(x, ctx.add), num_warps=_warps(x))
        ctx.save_for_backward(total, weight_D)
        return (total, y) if ctx.add else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        total, weight_D = ctx.saved_tensors
        dsum, dy = grads if ctx.add else (None, grads[0])
        if dy is None:
            return dsum, dsum, None, None
        dy = dy.contiguous()
        add = dsum is not None
        dsum = dsum.contiguous() if add else dy
        width = total.shape[-1]
        rows = total.numel() // width
        programs = max(1, min(rows, PROGRAMS * device_traits(total.device)[0]))
        dx = torch.empty_like(total)
        part_PD = torch.zeros(programs, width, dtype=torch.float32, device=total.device)
        if rows:
            args = (dy, dsum, total, weight_D, dx, part_PD, rows, ctx.eps)
            launch_rms_norm_grad((programs, 1, 1), args, _constants(total, add), num_warps=_warps(total))
        return dx, dx if ctx.add else None, part_PD.sum(0).to(weight_D.dtype), None


def _constants(x: torch.Tensor, add: bool) -> dict:
    return {"D": x.shape[-1], "BLOCK": power_of_2(x.shape[-1]), "ADD": add}


def _warps(x: torch.Tensor) -> int:
    return max(1, min(16, power_of_2(x.shape[-1]) // 512))


def _check(x: torch.Tensor) -> None:
    if x.dtype == torch.float64 or (x.device.type != "cuda" and not interpreting()):
        raise ValueError(f"the norm kernel needs at most fp32 on a GPU; got {x.dtype} on {x.device}")
    if x.shape[-1] > WIDEST:
        raise ValueError(f"the norm kernel takes rows of at most {WIDEST}; got {x.shape[-1]}")


@torch.compiler.disable
def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in x's dtype. Differentiable once.

    Raises ValueError for fp64, for tensors that are not on a GPU, and for rows wider than WIDEST.
    """
    _check(x)
    return RMSNorm.apply(x, None, weight_D, eps)


@torch.compiler.disable
def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta, and `rms_norm` of it as it is stored. Raises as that does."""
    _check(x)
    return RMSNorm.apply(x, delta, weight_D, eps)
