"""The experts' work on rows that come in pieces: by the backend's own means, or by autograd of one call a piece."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moetrain.moe.experts.base import Divisible, ExpertBackend, More, Pieces, Wanted

Weights = tuple[Tensor, Tensor]  # w_gate_up_E2FD, w_down_EDF


def divide(backend: ExpertBackend, weights: Weights, wanted: Wanted | None) -> Pieces:
    """See `base.Divisible`, for any backend."""
    return backend.divide(weights, wanted) if isinstance(backend, Divisible) else CallPieces(backend, weights, wanted)


class CallPieces:
    """One call of the backend a piece, each with its own graph. First halves do everything; gradients are added up."""

    beside = False

    def __init__(self, backend: ExpertBackend, weights: Weights, wanted: Wanted | None) -> None:
        self.backend, self.weights, self.wanted = backend, weights, wanted
        self.made: list[Tensor | None] = []
        self.graphs: list[tuple[torch.autograd.graph.GradientEdge, list[Tensor]] | None] = []
        self.gradients: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        self.dw: list[Tensor | None] = [None, None]

    def start(
        self, x_MD: Tensor, expert_MK: Tensor, gate_MK: Tensor, base: int, land: Callable[[], None] | None = None
    ) -> None:
        if land is not None:
            land()
        expert_MK, gate_MK = (expert_MK - base).long(), gate_MK.contiguous()
        if self.wanted is None:
            self.made.append(self.backend(x_MD, expert_MK, gate_MK, *self.weights))
            return
        inputs = (x_MD, gate_MK, *self.weights)
        leaves = [t.detach().requires_grad_(wanted) for t, wanted in zip(inputs, self.wanted)]
        with torch.enable_grad():
            y_MD = self.backend(leaves[0], expert_MK, *leaves[1:])
        self.graphs.append((torch.autograd.graph.get_gradient_edge(y_MD), leaves))
        self.made.append(y_MD.detach())

    def finish(self, piece: int, out_MD: Tensor | None = None, more: More | None = None) -> Tensor:
        y_MD, self.made[piece] = self.made[piece], None
        assert y_MD is not None
        return _plus(y_MD, more()[0]) if more else y_MD

    def start_gradients(self, piece: int, dy_MD: Tensor, far: bool) -> None:
        found = self._gradients(piece, dy_MD)
        self.gradients[piece] = found[0], found[1]
        self.dw = [_add(total, part) for total, part in zip(self.dw, found[2:])]

    def _gradients(self, piece: int, dy_MD: Tensor) -> list[Tensor | None]:
        """Of x, gates, and both weights, None where none is wanted. The graph is used up."""
        graph, self.graphs[piece] = self.graphs[piece], None
        assert graph is not None
        edge, leaves = graph
        found = iter(torch.autograd.grad([edge], [leaf for leaf in leaves if leaf.requires_grad], [dy_MD]))
        return [next(found) if leaf.requires_grad else None for leaf in leaves]

    def finish_gradients(
        self, piece: int, out_MD: Tensor | None = None, more: More | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        dx_MD, dgate_MK = self.gradients.pop(piece)
        if more is None:
            return dx_MD, dgate_MK
        rows, gates = more()
        return (
            None if dx_MD is None else _plus(dx_MD, rows),
            None if dgate_MK is None or gates is None else _plus(dgate_MK, gates),
        )

    def weight_gradients(self, meanwhile: Callable[[], None] | None = None) -> tuple[Tensor | None, Tensor | None]:
        if meanwhile is not None:
            meanwhile()
        return self.dw[0], self.dw[1]


def _plus(own: Tensor, parts: Tensor) -> Tensor:
    for part in parts.unbind():
        own = own + part[: len(own)]
    return own


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """In place where the total is ours alone: weight gradients are large."""
    if total is None or part is None:
        return part if total is None else total
    return total.add_(part) if total.is_contiguous() else total + part
