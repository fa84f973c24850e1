"""Auxiliary-loss-free balancing ("Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moetrain.config.values import require_range
from moetrain.moe.balance.base import Balance


class SelectionBias(Balance):
    """bias_E += rate * sign(mean(count) - count_E) after each step: overloaded experts become less likely.

    The bias takes part in the choice only, never in a gate, and has no gradient. Counts are taken before any token is
    dropped, over the whole global batch, so all ranks hold the same bias.
    """

    bias_E: Tensor

    def __init__(self, n_experts: int, rate: float = 0.001) -> None:
        super().__init__()
        require_range("rate", rate, 0, math.inf)
        self.rate = rate
        self.bias_E = torch.zeros(n_experts, dtype=torch.float32)  # a buffer: registered, empty, by Balance

    def before_step(self, count_E: Tensor) -> None:
        # Integers keep the sign exact: mean - count has the sign of sum - E * count.
        self.bias_E += self.rate * (count_E.sum() - count_E * count_E.numel()).sign()
