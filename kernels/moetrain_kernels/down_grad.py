"""Backward through the down-projection and SwiGLU: one kernel on Hopper, elsewhere a product and a pass over memory."""

from __future__ import annotations

import torch

from .down_grad_ws import down_grad_ws
from .gemm import grouped_gemm
from .launch import Ring, Tiles
from .plan import RowPlan
from .swiglu_grad import swiglu_grad


def down_grad(
    dy_TD: torch.Tensor,
    gate_TK: torch.Tensor,
    plan: RowPlan,
    w_down_EDF: torch.Tensor,
    h_R2F: torch.Tensor,
    tiles: Tiles | Ring,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`dh_R2F`, `gate * a_RF`, and `part_RP` (fp32) whose row sums are the gate gradient.

    Rows past the plan's total are zero up to TAIL_ROWS, and undefined from there.
    """
    if isinstance(tiles, Ring) and tiles.fuse:
        return down_grad_ws(dy_TD, gate_TK, plan, w_down_EDF, h_R2F, tiles)
    b_RF = grouped_gemm(dy_TD, plan, w_down_EDF, tiles, transposed=True, gather=True)
    return swiglu_grad(b_RF, gate_TK, plan, h_R2F)
