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
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`dh_R2F`, `gate * a_RF`, and `part_RP` (fp32) whose row sums are the gate gradient.

    Rows past the plan's total are zero up to TAIL_ROWS, and undefined from there. out: where dh and gate * a go.
    """
    dh_R2F, a_RF = out or (torch.empty_like(h_R2F), h_R2F.new_empty(h_R2F.shape[0], h_R2F.shape[1] // 2))
    if isinstance(tiles, Ring):
        part_RP = down_grad_ws(dy_TD, gate_TK, plan, w_down_EDF, h_R2F, tiles, dh_R2F, a_RF)
        return dh_R2F, a_RF, part_RP
    b_RF = grouped_gemm(dy_TD, plan, w_down_EDF, tiles, transposed=True, gather=True, out_RN=a_RF)
    return swiglu_grad(b_RF, gate_TK, plan, h_R2F, dh_R2F)
