"""Activation recomputation: what a forward pass stores is dropped and worked out again in the backward pass.

    full       each block keeps its input only;
    selective  attention and the experts keep their inputs only; projections of the router, norms, and everything that
               travels between ranks are stored.

Routing is decided once (moe/kept.py): a recomputed pass takes the same experts, exchanges no counts, and adds no loss
and no statistics. With `selective` it is not even run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.kept import Kept
from moetrain.moe.layer import MoELayer


def apply_recompute(blocks: list[nn.Module], policy: str) -> None:
    """policy: none | full | selective. Names and hooks of modules stay as they are; call it before apply_fsdp."""
    for block in blocks:
        layers = [module for module in block.modules() if isinstance(module, MoELayer)]
        if policy == "full":
            _recompute(block, layers)
        elif policy == "selective":
            assert isinstance(block.attention, nn.Module)
            _recompute(block.attention, [])
            for layer in layers:  # only what is computed: the exchange around it is not repeated
                layer.experts.backend = _recomputed(layer.experts.backend)


def _recompute(module: nn.Module, layers: list[MoELayer]) -> None:
    plain: Callable[..., Any] = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        memories = [(layer, Kept()) for layer in layers]  # of this micro-batch: several may be under way at once
        contexts = lambda: (_remember(memories), _remember(memories))  # noqa: E731
        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    module.forward = forward


def _recomputed(backend: ExpertBackend) -> ExpertBackend:
    def call(x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor) -> Tensor:
        inputs = (x_TD, expert_TK, gate_TK, w_gate_up_E2FD, w_down_EDF)
        return checkpoint(backend, *inputs, use_reentrant=False) if torch.is_grad_enabled() else backend(*inputs)

    return call


@contextmanager
def _remember(memories: list[tuple[MoELayer, Kept]]) -> Iterator[None]:
    for layer, kept in memories:
        layer.kept = kept
    try:
        yield
    finally:
        for layer, _ in memories:
            layer.kept = None
