"""The two hooks of a balance plugin, and how its loss enters the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.moe.types import Routing


class Balance(nn.Module):
    """One instance per MoE layer. Override what you need; the constructor takes n_experts and your own options.

    on_routing(routing) -> 0-d loss or None: called for every micro-batch that trains. The returned values, summed over
        ranks, micro-batches, and layers, are the term of the objective: divide by `routing.context.totals`.
    before_step(count_E): called once per optimizer step, before the optimizer, with the choices of all valid tokens of
        the global batch (int64, summed over ranks). Must be a deterministic function of it, so every rank agrees.
    no_step(): called in its place when a bad step is not taken: forget what on_routing kept of its micro-batches.
    bias_E: fp32 [E] added to the selection score, or None.
    row: the ranks that hold the other stretches of this rank's rows; None if rows are whole here.
    tokens: the ranks that hold the other tokens of a micro-step; None is this process alone.
    Both are set by parallel/ep.py.
    """

    bias_E: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias_E", None)
        self.row: dist.ProcessGroup | None = None
        self.tokens: dist.ProcessGroup | None = None

    def on_routing(self, routing: Routing) -> Tensor | None:
        return None

    def before_step(self, count_E: Tensor) -> None:
        return None

    def no_step(self) -> None:
        return None


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.detach()
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones_like(ctx.loss)


def attach_loss(y: Tensor, loss: Tensor) -> Tensor:
    """`y` unchanged, with `loss` added to the objective: its gradient is 1 wherever y's is taken."""
    return _AttachLoss.apply(y, loss)


class _AttachGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, grads: Sequence[Tensor | None], *tensors: Tensor) -> Tensor:
        # On ctx, not by save_for_backward: recomputation would ask for saved tensors again.
        ctx.grads = grads
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, *ctx.grads


def attach_gradients(y: Tensor, tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
    """`y` unchanged, with a loss added to the objective whose gradients by `tensors` are known to be `grads`."""
    return _AttachGradients.apply(y, tuple(grads), *tensors)
