"""How rows look on their way between ranks: as they are, or as 8-bit floats with one scale per row.

fp8: e4m3 (arXiv:2209.05433), 4 significant bits, so each entry is off by at most 2^-4 of itself, or by 2^-10 scales
where it is so small (below 2^-6 scales) that e4m3 spaces its numbers evenly. The scale is the power of two that brings
a row's largest entry into [128, 256): scaling rounds nothing, and bf16 holds every decoded entry exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import ExchangeShape

WIRES = ("full", "fp8")
FP8 = torch.float8_e4m3fn
TOP = 8  # the largest entry lies below 2^TOP scales; e4m3 ends at 1.75 * 2^8
LARGEST = 240.0  # of e4m3 below 2^TOP: rounding up to 2^TOP could leave bf16's range
LEAST = -126  # exponent of the smallest normal fp32, the smallest scale


def encode(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(uint8 [T, D], scales fp32 [T, 1]). A row with an entry that is not finite is NaN when decoded.

    Bytes, because gloo cannot move 8-bit floats.
    """
    largest_T1 = torch.linalg.vector_norm(x_TD, ord=torch.inf, dim=1, keepdim=True).float()
    exponent_T1 = (torch.frexp(largest_T1).exponent - TOP).clamp(min=LEAST)
    scale_T1 = ((exponent_T1 + 127) << 23).view(torch.float32)
    scale_T1 = torch.where(largest_T1.isfinite(), scale_T1, torch.nan)
    return (x_TD / scale_T1).clamp_(-LARGEST, LARGEST).to(FP8).view(torch.uint8), scale_T1


def decode(byte_TD: Tensor, scale_T1: Tensor, dtype: torch.dtype) -> Tensor:
    """What `encode` was given, rounded, in `dtype`."""
    return (byte_TD.view(FP8).float() * scale_T1.float()).to(dtype)


def check_wire(dispatch: str, wire: str, shape: ExchangeShape) -> None:
    """Raises ValueError for a name that is none of WIRES, and for fp8 where rows have more bits than bf16."""
    if wire not in WIRES:
        raise ValueError(f"dispatch.wire={wire!r} is not one of {', '.join(WIRES)}; nearest legal value: full")
    if wire == "fp8" and shape.dtype != torch.bfloat16:
        precision = str(shape.dtype).removeprefix("torch.")
        reason = f"dispatch.wire=fp8 ({dispatch}) is for train.precision=bf16, not for {precision} rows"
        raise ValueError(f"{reason}; nearest legal value: full")
