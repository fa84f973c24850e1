"""What a MoE layer asks of whoever records or replays its routing."""

from __future__ import annotations

from typing import Protocol

from moetrain.moe.types import Routing, TokenContext


class LayerTape(Protocol):
    """One layer's recorder or player; it sees each training micro-batch once, never a recomputation."""

    def recall(self, context: TokenContext) -> TokenContext:
        """The context with what router and balance losses must take, -1 for padding; unchanged leaves them free."""

    def note(self, routing: Routing) -> None:
        """What the router returned."""
