"""What a MoE layer asks of whoever records or replays its routing."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moetrain.moe.types import Routing, TokenContext


class LayerTape(Protocol):
    """One layer's recorder or player; it sees each training micro-batch once, never a recomputation."""

    def recall(self, context: TokenContext) -> Tensor | None:
        """The experts [T, K] that the router must take, -1 for padding; None leaves it free."""

    def note(self, routing: Routing) -> None:
        """What the router returned."""
