"""Router z-loss ("ST-MoE: Designing Stable and Transferable Sparse Expert Models")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moetrain.config.values import require_range
from moetrain.moe.balance.base import Balance
from moetrain.moe.types import Routing


class ZLoss(Balance):
    """coefficient * mean over the global batch's tokens of logsumexp(logits)^2. Padding does not count."""

    def __init__(self, n_experts: int, coefficient: float = 0.001) -> None:
        super().__init__()
        require_range("coefficient", coefficient, 0, math.inf)
        self.coefficient = coefficient

    def on_routing(self, routing: Routing) -> Tensor:
        z_T = routing.logit_TE.logsumexp(dim=-1).square()
        z_T = torch.where(routing.context.valid_T, z_T, 0.0)
        return self.coefficient * z_T.sum() / routing.context.totals.tokens.to(z_T.dtype)
