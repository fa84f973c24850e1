"""The MoE layer: route -> dispatch -> experts -> combine."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moetrain.moe.balance.base import Balance, attach_gradients, attach_loss
from moetrain.moe.beside import Beside
from moetrain.moe.capacity import Capacity, without_dropped
from moetrain.moe.experts.module import Experts
from moetrain.moe.kept import Kept, kept_graph
from moetrain.moe.shared import SharedExperts
from moetrain.moe.stats import RoutingStats
from moetrain.moe.tape import LayerTape
from moetrain.moe.types import Routing, TokenContext

DIFFERENTIABLE = ("gate_TK", "balance_TE", "logit_TE")


class MoELayer(nn.Module):
    """router: (x_TD, context, bias_E, carry) -> Routing. balance: name -> plugin. shared: experts every token visits.

    capacity: set by parallel/ep.py; None drops nothing. kept: set by parallel/recompute.py around each pass.
    tape: set by the trainer to record or replay routing.
    """

    def __init__(
        self, router: nn.Module, experts: Experts, balance: dict[str, Balance], shared: SharedExperts | None
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.balance = nn.ModuleDict(balance)
        self.shared = shared
        self.capacity: Capacity | None = None
        self.stats = RoutingStats()
        self.kept: Kept | None = None
        self.tape: LayerTape | None = None

    def forward(
        self, x_BSD: Tensor, context: TokenContext, carry: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns y_BSD and what the next MoE layer's router may look at."""
        x_TD = x_BSD.flatten(0, 1)
        training = torch.is_grad_enabled()  # evaluation moves neither losses nor counters
        again = self.kept is not None and self.kept.expert_TK is not None
        routing = self._route(x_TD, context, carry, training and not again)
        beside = Beside(self.shared) if self.shared is not None else None
        y_TD = self.experts(x_TD, replace(self._limit(routing) if training else routing, beside=beside))
        if beside is not None and not beside.done:
            y_TD = y_TD + beside.module(x_TD)
        if training and not again:
            y_TD = self._balance(y_TD, routing)
        return y_TD.view_as(x_BSD), routing.carry

    def plugins(self) -> dict[str, Balance]:
        """Balance plugins by name."""
        return dict(self.balance.items())  # type: ignore[arg-type]

    def _route(self, x_TD: Tensor, context: TokenContext, carry: Tensor | None, first: bool) -> Routing:
        """first: the pass that decides and is counted, not an evaluation and not a recomputation."""
        kept, tape = self.kept, self.tape if first else None
        if kept is not None and kept.expert_TK is not None:
            context = replace(context, chosen_TK=kept.expert_TK)
        elif tape is not None:
            context = tape.recall(context)
        routing = self.router(x_TD, context, self._selection_bias(), carry)
        if tape is not None:
            tape.note(routing)
        if kept is not None:
            kept.expert_TK = routing.expert_TK
            routing = replace(routing, kept=kept)
        return routing

    def _limit(self, routing: Routing) -> Routing:
        """What is dispatched in training. Balance losses and counts look at the choices before anything is dropped."""
        if self.capacity is None:
            return routing
        kept = self.kept
        keep_TK = kept.keep_TK if kept is not None else None
        if keep_TK is None:
            keep_TK = self.capacity.keep(routing)
            self.stats.drop(((routing.expert_TK >= 0) & ~keep_TK).sum())
        if kept is not None:
            kept.keep_TK = keep_TK
        return without_dropped(routing, keep_TK, self.capacity)

    def _selection_bias(self) -> Tensor | None:
        biases = [plugin.bias_E for plugin in self.plugins().values() if plugin.bias_E is not None]
        return torch.stack(biases).sum(0) if biases else None

    def _balance(self, y_TD: Tensor, routing: Routing) -> Tensor:
        if self.kept is None:
            for loss in self._losses(routing):
                y_TD = attach_loss(y_TD, loss)
            return y_TD
        # The gradients are worked out now, so that a recomputed pass has no loss to take again.
        tensors = {name: getattr(routing, name) for name in DIFFERENTIABLE}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        with kept_graph():
            losses = [loss for loss in self._losses(replace(routing, **leaves)) if loss.requires_grad]
            if not losses:
                return y_TD
            grads = torch.autograd.grad(sum(losses[1:], losses[0]), list(leaves.values()), allow_unused=True)
        return attach_gradients(y_TD, list(tensors.values()), grads)

    def _losses(self, routing: Routing) -> list[Tensor]:
        losses = {name: plugin.on_routing(routing) for name, plugin in self.plugins().items()}
        present = {name: loss for name, loss in losses.items() if loss is not None}
        self.stats.add(routing, present)
        return list(present.values())
