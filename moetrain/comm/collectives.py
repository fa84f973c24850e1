"""Collectives with gradients. Handles and groups belong to whoever calls; nothing here is global."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of `x` over `group`, in a new tensor, without gradient. group None: this process alone."""
    total = x.detach().clone()
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def sum_over(groups: list[dist.ProcessGroup], x: Tensor) -> Tensor:
    """`all_reduce_sum` over each of `groups` in turn."""
    for group in groups:
        x = all_reduce_sum(x, group)
    return x


@dataclass
class Moving:
    """Rows on their way to this rank, or already here. Whoever started them waits for them, once."""

    rows: Tensor
    work: dist.Work | None = None
    source: Tensor | None = None  # what is being read until then

    def wait(self) -> Tensor:
        """The rows, ready on the current stream."""
        if self.work is not None:
            self.work.wait()
        self.work = self.source = None
        return self.rows


def start_all_to_all(
    x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, out: Tensor | None = None
) -> Moving:
    """`all_to_all_rows` without a gradient that returns at once; what is computed meanwhile runs beside it.

    out: contiguous memory for the rows that come.
    """
    source = x.contiguous()
    rows = x.new_empty((sum(receive), *x.shape[1:])) if out is None else out
    work = dist.all_to_all_single(rows, source, receive, send, group=group, async_op=True)
    return Moving(rows, work, source)


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


def all_to_all_rows(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first send[0] rows of `x` to rank 0 of `group`, the next send[1] to rank 1, and so on.

    x: [sum(send), ...]. Returns [sum(receive), ...], receive[r] rows from rank r in rank order. The gradient travels
    back the same way. Every rank of the group must call it, also with no rows.
    """
    return _AllToAllRows.apply(x, send, receive, group)
