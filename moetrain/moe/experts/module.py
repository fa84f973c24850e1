"""The routed experts' parameters, apart from how they are multiplied."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.comm.shards import local
from moetrain.moe.experts.base import ExpertBackend


class Experts(nn.Module):
    """w_gate_up [E, 2, F, D], w_down [E, D, F], divided along E and F by parallel/ep.py."""

    def __init__(self, n_experts: int, d_model: int, d_expert: int, backend: ExpertBackend) -> None:
        super().__init__()
        self.w_gate_up = nn.Parameter(torch.empty(n_experts, 2, d_expert, d_model))
        self.w_down = nn.Parameter(torch.empty(n_experts, d_model, d_expert))
        self.backend = backend

    def forward(self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
        return self.backend(x_TD, expert_TK, gate_TK, local(self.w_gate_up), local(self.w_down))
