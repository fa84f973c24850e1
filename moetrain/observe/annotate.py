"""Name the parts of a model in profiler traces. Only `moetrain profile` does this: the ranges cost host time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.profiler import record_function

from moetrain.model.block import Block
from moetrain.moe.layer import MoELayer
from moetrain.observe.timeline import LABEL


def annotate(model: nn.Module) -> None:
    """Put a labelled range around attention, dense MLP, router, dispatch, experts, and shared experts of each layer."""
    for block in (m for m in model.modules() if isinstance(m, Block)):
        _wrap(block.attention, "attention")
        if not block.is_moe:
            _wrap(block.mlp, "dense mlp")
    for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
        _wrap(layer.router, "router")
        if layer.shared is not None:
            _wrap(layer.shared, "shared experts")
        layer.experts.dispatcher = _labelled(layer.experts.dispatcher, "dispatch")
        layer.experts.backend = _labelled(layer.experts.backend, "experts")


def _wrap(module: nn.Module, part: str) -> None:
    module.forward = _labelled(module.forward, part)


def _labelled(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(LABEL + part):
            return function(*args, **kwargs)

    return inside
