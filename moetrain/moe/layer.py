"""The MoE layer: route -> dispatch -> experts -> combine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.moe.balance.base import Balance, attach_loss
from moetrain.moe.dispatch.base import Dispatcher
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.experts.module import Experts
from moetrain.moe.shared import SharedExperts
from moetrain.moe.stats import RoutingStats
from moetrain.moe.types import Routing, TokenContext


class MoELayer(nn.Module):
    """router: (x_TD, context, bias_E, carry) -> Routing. balance: name -> plugin. shared: experts every token visits.

    The dispatcher starts as the local one; parallel/ep.py replaces it when the experts are divided between ranks.
    """

    def __init__(
        self, router: nn.Module, experts: Experts, balance: dict[str, Balance], shared: SharedExperts | None
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.balance = nn.ModuleDict(balance)
        self.shared = shared
        self.dispatcher: Dispatcher = LocalDispatch()
        self.stats = RoutingStats()

    def forward(
        self, x_BSD: Tensor, context: TokenContext, carry: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns y_BSD and what the next MoE layer's router may look at."""
        x_TD = x_BSD.flatten(0, 1)
        routing = self.router(x_TD, context, self._selection_bias(), carry)
        y_TD = self.dispatcher(x_TD, routing, self.experts)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        if torch.is_grad_enabled():  # evaluation moves neither losses nor counters
            y_TD = self._balance(y_TD, routing)
        return y_TD.view_as(x_BSD), routing.carry

    def plugins(self) -> dict[str, Balance]:
        """Balance plugins by name."""
        return dict(self.balance.items())  # type: ignore[arg-type]

    def _selection_bias(self) -> Tensor | None:
        biases = [plugin.bias_E for plugin in self.plugins().values() if plugin.bias_E is not None]
        return torch.stack(biases).sum(0) if biases else None

    def _balance(self, y_TD: Tensor, routing: Routing) -> Tensor:
        losses = {name: plugin.on_routing(routing) for name, plugin in self.plugins().items()}
        present = {name: loss for name, loss in losses.items() if loss is not None}
        self.stats.add(routing, present)
        for loss in present.values():
            y_TD = attach_loss(y_TD, loss)
        return y_TD
