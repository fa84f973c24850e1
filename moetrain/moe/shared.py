"""Shared experts: always on, so one wide SwiGLU ("DeepSeekMoE"), with an optional sigmoid gate (Qwen2-MoE)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.fused import silu_times


class SharedExperts(nn.Module):
    """w_gate_up [2, F, D], w_down [D, F], F the hidden width of all shared experts together; gate [1, D] if gated."""

    def __init__(self, d_model: int, d_shared: int, gated: bool) -> None:
        super().__init__()
        self.w_gate_up = nn.Parameter(torch.empty(2, d_shared, d_model))
        self.w_down = nn.Parameter(torch.empty(d_model, d_shared))
        self.gate = nn.Parameter(torch.empty(1, d_model)) if gated else None

    def forward(self, x_TD: Tensor) -> Tensor:
        h_T2F = F.linear(x_TD, self.w_gate_up.flatten(0, 1)).unflatten(-1, (2, -1))
        y_TD = F.linear(silu_times(h_T2F[:, 0], h_T2F[:, 1]), self.w_down)
        return y_TD if self.gate is None else F.linear(x_TD, self.gate).sigmoid() * y_TD
