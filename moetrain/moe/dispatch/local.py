"""All experts are on this rank: nothing moves."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from moetrain.moe.dispatch.base import ExchangeShape, Weights
from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.types import Routing


class LocalDispatch:
    """The dispatcher of ep=1."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: ExpertBackend, weights: Weights) -> Tensor:
        return experts(x_TD, routing.expert_TK, routing.gate_TK, *weights)


def build(n_experts: int, group: dist.ProcessGroup | None, shape: ExchangeShape) -> LocalDispatch:
    """Raises ValueError when the experts are divided between ranks."""
    if group is not None and group.size() > 1:
        raise ValueError(f"dispatch=local with parallel.ep={group.size()}; nearest legal value: dispatch=collective")
    return LocalDispatch()
