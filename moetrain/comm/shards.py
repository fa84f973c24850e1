"""Equal shards along one dim of a tensor: gather them, or sum and scatter them. Each is the other's gradient.

The gradient of a gather is a sum because every rank uses the gathered tensor for something else (its heads, its
columns, its slice of an expert); the gradient of a sum is every rank's share of it, gathered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.comm.compat import all_gather_single, reduce_scatter_single


def local(weight: Tensor) -> Tensor:
    """What this rank holds of a weight, with the gradient in the weight's own placement; a plain tensor as it is."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def gather_shards(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The shards of all ranks of `group`, concatenated along `dim` in rank order: size n becomes n * ranks.

    Gradients are summed over the ranks and scattered. Every rank must pass the same shape.
    """
    return _Gather.apply(x, dim, group)


def sum_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's shard along `dim` of the sum of `x` over `group`: size n becomes n / ranks.

    Gradients are gathered. Every rank must pass the same shape, with `dim` a multiple of the ranks.
    """
    return _SumScatter.apply(x, dim, group)


def sum_everywhere(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of `x` over `group` on each of its ranks. Gradients are summed too: every rank uses the sum."""
    return _Sum.apply(x, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _sum_scatter(grads[0], ctx.dim, ctx.group), None, None


class _SumScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _sum_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grads[0], ctx.dim, ctx.group), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.group), None


def _gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The collective knows dim 0 only, so `dim` travels there and back."""
    first = x.movedim(dim, 0).contiguous()
    out = first.new_empty((first.shape[0] * group.size(), *first.shape[1:]))
    all_gather_single(out, first, group=group)
    return out.movedim(0, dim)


def _sum_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    first = x.movedim(dim, 0).contiguous()
    assert first.shape[0] % group.size() == 0, f"{first.shape[0]} along dim {dim} over {group.size()} ranks"
    out = first.new_empty((first.shape[0] // group.size(), *first.shape[1:]))
    reduce_scatter_single(out, first, group=group)
    return out.movedim(0, dim)


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total
