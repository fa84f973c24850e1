"""Work on a rank's own tokens that needs nobody else's rows, to be done while rows travel: shared experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Graph:
    """Of one pass: y, and the inputs that want gradients."""

    edge: Any
    leaves: list[Tensor]


class Beside:
    """A module, x_TD -> y_TD, whose result an exchange adds to its own if it knows of it, and sets `done`.

    Its parameters are inputs of the exchange's autograd function; its graph is kept by that. So its gradients are made
    when the exchange says, not when autograd comes to them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.done = module, False
        self.parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]

    def run(self, x_TD: Tensor, wants_dx: bool, with_graph: bool) -> tuple[Tensor, Graph | None]:
        """y_TD, and what `gradients` needs if that will be called."""
        self.done = True
        if not with_graph or not (wants_dx or self.parameters):
            with torch.no_grad():
                return self.module(x_TD), None
        leaf_TD = x_TD.detach().requires_grad_(wants_dx)
        with torch.enable_grad():
            y_TD = self.module(leaf_TD)
        leaves = [leaf_TD, *self.parameters] if wants_dx else self.parameters
        return y_TD.detach(), Graph(torch.autograd.graph.get_gradient_edge(y_TD), leaves)


def gradients(graph: Graph, dy_TD: Tensor) -> list[Tensor]:
    """Of x, if it wants one, and of the parameters. The graph is used up."""
    return list(torch.autograd.grad([graph.edge], graph.leaves, [dy_TD]))
