"""Name the parts of a model in profiler traces. Only `moetrain profile` does this: the ranges cost host time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.profiler import record_function

from moetrain.model.block import Block
from moetrain.moe.experts.base import Divisible, ExpertBackend, More, Pieces, Wanted
from moetrain.moe.layer import MoELayer
from moetrain.observe.timeline import LABEL


def annotate(model: nn.Module) -> None:
    """Put a labelled range around attention, dense MLP, router, dispatch, experts, and shared experts of each layer.

    What runs stays what it is: a backend that does more for pieces than one call each goes on doing so.
    """
    for block in (m for m in model.modules() if isinstance(m, Block)):
        _wrap(block.attention, "attention")
        if not block.is_moe:
            _wrap(block.mlp, "dense mlp")
    for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
        _wrap(layer.router, "router")
        if layer.shared is not None:
            _wrap(layer.shared, "shared experts")
        layer.experts.dispatcher = _labelled(layer.experts.dispatcher, "dispatch")
        layer.experts.backend = _labelled_backend(layer.experts.backend)


def _wrap(module: nn.Module, part: str) -> None:
    module.forward = _labelled(module.forward, part)


def _labelled(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(LABEL + part):
            return function(*args, **kwargs)

    return inside


def _labelled_backend(backend: ExpertBackend) -> ExpertBackend:
    if isinstance(backend, Divisible):
        return _Divisible(backend)
    return _labelled(backend, "experts")


class _Divisible:
    def __init__(self, backend: Any) -> None:
        self._call, self._divide = _labelled(backend, "experts"), backend.divide

    def __call__(
        self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor
    ) -> Tensor:
        return self._call(x_TD, expert_TK, gate_TK, w_gate_up_E2FD, w_down_EDF)

    def divide(self, weights: tuple[Tensor, Tensor], wanted: Wanted | None) -> Pieces:
        return _Pieces(self._divide(weights, wanted))


class _Pieces:
    """`Pieces` under the experts' label. What they are given to call in between is the dispatcher's."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces, self.beside = pieces, pieces.beside

    def start(
        self, x_MD: Tensor, expert_MK: Tensor, gate_MK: Tensor, base: int, land: Callable[[], None] | None = None
    ) -> None:
        _experts(self.pieces.start, x_MD, expert_MK, gate_MK, base, _dispatch(land))

    def finish(self, piece: int, out_MD: Tensor | None = None, more: More | None = None) -> Tensor:
        return _experts(self.pieces.finish, piece, out_MD, _dispatch(more))

    def start_gradients(self, piece: int, dy_MD: Tensor, far: bool) -> None:
        _experts(self.pieces.start_gradients, piece, dy_MD, far)

    def finish_gradients(
        self, piece: int, out_MD: Tensor | None = None, more: More | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        return _experts(self.pieces.finish_gradients, piece, out_MD, _dispatch(more))

    def weight_gradients(self, meanwhile: Callable[[], None] | None = None) -> tuple[Tensor | None, Tensor | None]:
        return _experts(self.pieces.weight_gradients, _dispatch(meanwhile))


def _experts(function: Callable[..., Any], *args: Any) -> Any:
    return _labelled(function, "experts")(*args)


def _dispatch(function: Callable[[], Any] | None) -> Callable[[], Any] | None:
    return None if function is None else _labelled(function, "dispatch")
