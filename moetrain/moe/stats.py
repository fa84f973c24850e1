"""What one MoE layer counts during an optimizer step: for bias controllers and for the metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.types import Routing


class RoutingStats:
    """Sums over this rank's micro-batches since the last `reset`. Empty until the first routing is added."""

    def __init__(self) -> None:
        self.count_E: Tensor | None = None  # int64 choices by valid tokens, before any drop
        self.entropy: Tensor | None = None  # fp64 sum over valid tokens of the balance scores' entropy, nats
        self.dropped: Tensor | None = None  # int64 choices that capacity dropped; None without one
        self.losses: dict[str, Tensor] = {}  # fp64, this rank's part of each auxiliary loss

    def add(self, routing: Routing, losses: dict[str, Tensor]) -> None:
        score_TE = routing.balance_TE.detach()
        entropy_T = -torch.xlogy(score_TE, score_TE).sum(-1).double()
        entropy = torch.where(routing.context.valid_T, entropy_T, 0.0).sum()
        self.count_E = routing.count_E if self.count_E is None else self.count_E + routing.count_E
        self.entropy = entropy if self.entropy is None else self.entropy + entropy
        for name, loss in losses.items():
            part = loss.detach().double()
            self.losses[name] = self.losses[name] + part if name in self.losses else part

    def drop(self, choices: Tensor) -> None:
        """choices: 0-d count of this micro-batch."""
        self.dropped = choices if self.dropped is None else self.dropped + choices

    def reset(self) -> None:
        self.count_E, self.entropy, self.dropped = None, None, None
        self.losses = {}
