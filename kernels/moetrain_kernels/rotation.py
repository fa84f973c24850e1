"""Rotary positions, with the RMS norm of each head before them: one pass over queries or keys each way.

As separate operations the rotation alone writes four fp32 tensors of their size. Here x is read once and y written
once; all arithmetic is fp32. Kept for the backward pass: the tables and, for the norm, x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launcher, cdiv, device_traits, interpreting, power_of_2

ROW_ELEMENTS = 4096  # of one block of rows
PROGRAMS = 12  # of the backward pass, on each multiprocessor
GRAD_ELEMENTS = 1024  # and in the backward pass, where a program takes many blocks and holds more of each


@triton.jit
def _halves(base_N, i, inside, d, INTERLEAVED: tl.constexpr, ptr):
    """The two elements of every pair, fp32: (i, i + d/2), or (2i, 2i + 1) when interleaved."""
    step, half = 2 if INTERLEAVED else 1, 1 if INTERLEAVED else d // 2
    a = tl.load(ptr + base_N + step * i, mask=inside, other=0.0)
    b = tl.load(ptr + base_N + step * i + half, mask=inside, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit(do_not_specialize=["rows", "length", "x_b", "x_s", "x_h", "table_b"])
def norm_rope_kernel(
    x_ptr,
    weight_d,
    cos_ptr,
    sin_ptr,
    y_ptr,
    rows,
    length,
    x_b,
    x_s,
    x_h,
    table_b,
    eps,
    H: tl.constexpr,
    d: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """y = rotate(rms_norm(x) * weight), a row being one head of one token; y is [B, S, H, d], in halves."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, HALF)[None, :]
    inside = (row < rows)[:, None] & (i < d // 2)
    token = row // H
    b, s = token // length, token % length
    base = (b * x_b + s * x_s + (row % H) * x_h)[:, None]
    x0, x1 = _halves(base, i, inside, d, INTERLEAVED, x_ptr)
    if NORM:
        scale = tl.rsqrt((tl.sum(x0 * x0, axis=1) + tl.sum(x1 * x1, axis=1)) / d + eps)[:, None]
        w0, w1 = _halves(i * 0, i, i < d // 2, d, INTERLEAVED, weight_d)
        x0, x1 = x0 * scale * w0, x1 * scale * w1
    at = (b * table_b + s * (d // 2))[:, None] + i
    cos = tl.load(cos_ptr + at, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + at, mask=inside, other=0.0)
    out = row[:, None] * d + i
    tl.store(y_ptr + out, (x0 * cos - x1 * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + out + d // 2, (x1 * cos + x0 * sin).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "length", "x_b", "x_s", "x_h", "y_b", "y_s", "y_h", "table_b", "blocks"])
def norm_rope_grad_kernel(
    dy_ptr,
    x_ptr,
    weight_d,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    part_Pd,
    rows,
    length,
    x_b,
    x_s,
    x_h,
    y_b,
    y_s,
    y_h,
    table_b,
    blocks,
    eps,
    H: tl.constexpr,
    d: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """dx [B, S, H, d]; with NORM each program's part of the weight's gradient, in halves."""
    i = tl.arange(0, HALF)[None, :]
    dw0, dw1 = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
    if NORM:
        w0, w1 = _halves(i * 0, i, i < d // 2, d, INTERLEAVED, weight_d)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (i < d // 2)
        token = row // H
        b, s, h = token // length, token % length, row % H
        dy0, dy1 = _halves((b * y_b + s * y_s + h * y_h)[:, None], i, inside, d, False, dy_ptr)
        at = (b * table_b + s * (d // 2))[:, None] + i
        cos = tl.load(cos_ptr + at, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + at, mask=inside, other=0.0)
        g0, g1 = dy0 * cos + dy1 * sin, dy1 * cos - dy0 * sin
        if NORM:
            x0, x1 = _halves((b * x_b + s * x_s + h * x_h)[:, None], i, inside, d, INTERLEAVED, x_ptr)
            scale = tl.rsqrt((tl.sum(x0 * x0, axis=1) + tl.sum(x1 * x1, axis=1)) / d + eps)[:, None]
            n0, n1 = x0 * scale, x1 * scale
            dw0 += g0 * n0
            dw1 += g1 * n1
            g0, g1 = g0 * w0, g1 * w1
            mean = ((tl.sum(g0 * n0, axis=1) + tl.sum(g1 * n1, axis=1)) / d)[:, None]
            g0, g1 = (g0 - n0 * mean) * scale, (g1 - n1 * mean) * scale
        out, step, half = row[:, None] * d, 2 if INTERLEAVED else 1, 1 if INTERLEAVED else d // 2
        dtype: tl.constexpr = dx_ptr.dtype.element_ty
        tl.store(dx_ptr + out + step * i, g0.to(dtype), mask=inside)
        tl.store(dx_ptr + out + step * i + half, g1.to(dtype), mask=inside)
    if NORM:
        part = tl.program_id(0).to(tl.int64) * d + i
        tl.store(part_Pd + part, tl.sum(dw0, axis=0)[None, :], mask=i < d // 2)
        tl.store(part_Pd + part + d // 2, tl.sum(dw1, axis=0)[None, :], mask=i < d // 2)


launch_norm_rope = Launcher(norm_rope_kernel)
launch_norm_rope_grad = Launcher(norm_rope_grad_kernel)


class NormRope(torch.autograd.Function):
    """The launches behind `norm_rope`."""

    @staticmethod
    def forward(ctx, x_BHSd, weight_d, cos, sin, eps, interleaved):
        if x_BHSd.stride(-1) != 1:
            x_BHSd = x_BHSd.contiguous()
        batch, heads, length, d = x_BHSd.shape
        y_BSHd = torch.empty(batch, length, heads, d, dtype=x_BHSd.dtype, device=x_BHSd.device)
        constants = _constants(x_BHSd, weight_d, interleaved, ROW_ELEMENTS)
        rows = batch * heads * length
        strides = (x_BHSd.stride(0), x_BHSd.stride(2), x_BHSd.stride(1))
        weight = x_BHSd if weight_d is None else weight_d  # not looked at then
        args = (x_BHSd, weight, cos, sin, y_BSHd, rows, length, *strides, _table_stride(cos), float(eps))
        if rows:
            launch_norm_rope((cdiv(rows, constants["ROWS"]), 1, 1), args, constants, num_warps=4)
        ctx.save_for_backward(x_BHSd if weight_d is not None else None, weight_d, cos, sin)
        ctx.rule = (eps, interleaved)
        return y_BSHd.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_BHSd):
        x_BHSd, weight_d, cos, sin = ctx.saved_tensors
        eps, interleaved = ctx.rule
        if dy_BHSd.stride(-1) != 1:
            dy_BHSd = dy_BHSd.contiguous()
        batch, heads, length, d = dy_BHSd.shape
        x = dy_BHSd if x_BHSd is None else x_BHSd  # without a norm x is not looked at
        dx_BSHd = torch.empty(batch, length, heads, d, dtype=x.dtype, device=x.device)
        constants = _constants(x, weight_d, interleaved, GRAD_ELEMENTS)
        rows = batch * heads * length
        blocks = cdiv(rows, constants["ROWS"])
        programs = blocks if weight_d is None else min(blocks, PROGRAMS * device_traits(x.device)[0])
        part_Pd = x.new_zeros(0 if weight_d is None else max(programs, 1), d, dtype=torch.float32)
        weight = x if weight_d is None else weight_d
        strides = [t.stride(n) for t in (x, dy_BHSd) for n in (0, 2, 1)]
        args = (dy_BHSd, x, weight, cos, sin, dx_BSHd, part_Pd, rows, length, *strides, _table_stride(cos), blocks)
        if rows:
            launch_norm_rope_grad((programs, 1, 1), (*args, float(eps)), constants, num_warps=4)
        dweight_d = None
        if weight_d is not None:
            dweight_d = part_Pd.sum(0)
            if interleaved:
                dweight_d = dweight_d.view(2, -1).T.flatten()
            dweight_d = dweight_d.to(weight_d.dtype)
        return dx_BSHd.transpose(1, 2), dweight_d, None, None, None, None


def _constants(x_BHSd: torch.Tensor, weight_d: torch.Tensor | None, interleaved: bool, elements: int) -> dict:
    heads, d = x_BHSd.shape[1], x_BHSd.shape[3]
    half = power_of_2(d // 2)
    return {
        "H": heads,
        "d": d,
        "HALF": half,
        "ROWS": max(1, elements // (2 * half)),
        "NORM": weight_d is not None,
        "INTERLEAVED": interleaved,
    }


def _table_stride(cos: torch.Tensor) -> int:
    """Elements from one row's table to the next; 0 where all rows share one."""
    return cos.stride(0) if cos.shape[0] > 1 else 0


@torch.compiler.disable
def norm_rope(
    x_BHSd: torch.Tensor,
    weight_d: torch.Tensor | None,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    eps: float = 0.0,
    interleaved: bool = False,
) -> torch.Tensor:
    """[B, H, S, d] rotated, with weight_d after x / sqrt(mean(x^2) + eps) * weight over each head.

    cos_sin: fp32 [B, 1, S, d/2] or [1, 1, S, d/2]. Pairs are (i, i + d/2), or (2i, 2i + 1) when interleaved; the
    result is in halves in both cases. It lies in memory as [B, S, H, d]. Differentiable once in x and weight. Raises
    ValueError for fp64 and for tensors that are not on a GPU.
    """
    if x_BHSd.dtype == torch.float64 or (x_BHSd.device.type != "cuda" and not interpreting()):
        raise ValueError(f"the rotation kernel needs at most fp32 on a GPU; got {x_BHSd.dtype} on {x_BHSd.device}")
    cos, sin = (table.contiguous() for table in cos_sin)
    return NormRope.apply(x_BHSd, weight_d, cos, sin, eps, interleaved)
