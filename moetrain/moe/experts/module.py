"""The routed experts of a layer: their parameters, how they are multiplied, and how tokens come to them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moetrain.comm.shards import local
from moetrain.fused import fused
from moetrain.moe.dispatch.base import Dispatcher
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.types import Routing


class Experts(nn.Module):
    """w_gate_up [E, 2, F, D], w_down [E, D, F], divided along E and F by parallel/ep.py, which sets the dispatcher too.

    The exchange runs inside this module: FSDP gathers the weights once around all of it, and reduces their gradient
    once, however many calls of the backend it takes. compute_dtype: what the weights are multiplied in, where no FSDP
    stands around them (parallel/fsdp.py); None is their own.
    slot_E: where each expert is among all ranks' (parallel/placement.py), and -1 at the end; None in logical order.
    """

    def __init__(self, n_experts: int, d_model: int, d_expert: int, backend: ExpertBackend) -> None:
        super().__init__()
        self.w_gate_up = nn.Parameter(torch.empty(n_experts, 2, d_expert, d_model))
        self.w_down = nn.Parameter(torch.empty(n_experts, d_model, d_expert))
        self.backend = backend
        self.dispatcher: Dispatcher = LocalDispatch()
        self.compute_dtype: torch.dtype | None = None
        self.slot_E: Tensor | None = None

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        if self.slot_E is not None:
            routing = replace(routing, expert_TK=self.slot_E[routing.expert_TK.clamp(min=-1)])
        weights = (local(self.w_gate_up), local(self.w_down))
        if self.compute_dtype is not None:
            weights = (_Cast.apply(weights[0], self.compute_dtype), _Cast.apply(weights[1], self.compute_dtype))
        return self.dispatcher(x_TD, routing, self.backend, weights)


class _Cast(torch.autograd.Function):
    """A weight in another dtype; its gradient comes back in the weight's own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        return weight.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if not fused(grads[0]):
            return grads[0].to(ctx.dtype), None
        import moetrain_kernels

        return moetrain_kernels.convert(grads[0], ctx.dtype), None
