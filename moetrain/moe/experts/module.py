"""The routed experts of a layer: their parameters, how they are multiplied, and how tokens come to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.comm.shards import local
from moetrain.moe.dispatch.base import Dispatcher
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.types import Routing


class Experts(nn.Module):
    """w_gate_up [E, 2, F, D], w_down [E, D, F], divided along E and F by parallel/ep.py, which sets the dispatcher too.

    The exchange runs inside this module: FSDP gathers the weights once around all of it, and reduces their gradient
    once, however many calls of the backend it takes. compute_dtype: what the weights are multiplied in, where no FSDP
    stands around them (parallel/fsdp.py); None is their own.
    """

    def __init__(self, n_experts: int, d_model: int, d_expert: int, backend: ExpertBackend) -> None:
        super().__init__()
        self.w_gate_up = nn.Parameter(torch.empty(n_experts, 2, d_expert, d_model))
        self.w_down = nn.Parameter(torch.empty(n_experts, d_model, d_expert))
        self.backend = backend
        self.dispatcher: Dispatcher = LocalDispatch()
        self.compute_dtype: torch.dtype | None = None

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        weights = (local(self.w_gate_up), local(self.w_down))
        if self.compute_dtype is not None:
            weights = (weights[0].to(self.compute_dtype), weights[1].to(self.compute_dtype))
        return self.dispatcher(x_TD, routing, self.backend, weights)
