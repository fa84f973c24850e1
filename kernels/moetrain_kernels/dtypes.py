"""A tensor in another dtype, times a number: torch's own kernel from bf16 to fp32 moves half of what memory could."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launcher, cdiv, interpreting

BLOCK = 4096


@triton.jit(do_not_specialize=["size"])
def convert_kernel(x_ptr, y_ptr, scale_ptr, size, BLOCK: tl.constexpr, EVEN: tl.constexpr, SCALED: tl.constexpr):
    """y = x (* scale), element by element."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if EVEN:  # a mask whose edge is unknown cuts every access to an element
        inside = tl.full((BLOCK,), 1, tl.int1)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        x *= tl.load(scale_ptr).to(tl.float32)
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=inside)


launch_convert = Launcher(convert_kernel)


@torch.compiler.disable
def convert(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None) -> torch.Tensor:
    """x * scale in `dtype`, rounded once, contiguous. scale: 0-d. Not differentiable.

    Raises ValueError for fp64 and for tensors that are not on a GPU.
    """
    if torch.float64 in (x.dtype, dtype) or (x.device.type != "cuda" and not interpreting()):
        raise ValueError(f"the conversion kernel needs at most fp32 on a GPU; got {x.dtype} to {dtype} on {x.device}")
    x = x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        args = (x, y, x if scale is None else scale, x.numel())
        constants = {"BLOCK": BLOCK, "EVEN": x.numel() % BLOCK == 0, "SCALED": scale is not None}
        launch_convert((cdiv(x.numel(), BLOCK), 1, 1), args, constants, num_warps=8)
    return y
