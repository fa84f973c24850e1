"""The global gradient norm over both meshes.

A DTensor's elements are split over the mesh axes where its placement is a shard and repeated over the others. So the
squares of the local part are summed over exactly the sharded axes: leaving one out undercounts (experts, usually),
and including a replicated one counts the same element several times.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.comm.shards import local


@torch.no_grad()
def grad_norm(parameters: Iterable[Tensor], stages: dist.ProcessGroup | None = None) -> Tensor:
    """L2 norm of all gradients, each element counted once: a 0-d tensor, equal on every rank.

    parameters: DTensors of any number of meshes, or plain tensors, which are taken as equal on every rank. Every rank
    must pass the same ones in the same order. A gradient of None counts as zero. Squares are summed in fp64 when a
    parameter is fp64 and in fp32 otherwise. One scalar all-reduce per distinct set of sharded axes and axis in it.
    stages: the ranks with the other pipeline stages' parameters at this rank's place, None without a pipeline.
    Raises ValueError for a gradient that still waits for its reduction (a Partial placement).
    """
    parameters = list(parameters)
    if not parameters:
        return torch.zeros(())
    wide = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    zero = torch.zeros((), dtype=wide, device=parameters[0].device)
    grads: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for parameter in parameters:
        # Keys come from the parameter, not its gradient: every rank then takes part in the same all-reduces.
        held = grads.setdefault(_sharded_over(parameter), [])
        if parameter.grad is not None:
            held.append(_reduced(parameter.grad))
    total = zero.clone()
    for groups, held in grads.items():
        # One launch for all of them. A tensor without elements has no norm that every torch can give.
        norms = torch._foreach_norm([grad for grad in held if grad.numel()], ord=2, dtype=wide) if held else []
        square = torch.stack(list(norms)).square().sum() if norms else zero.clone()
        for group in groups:
            dist.all_reduce(square, group=group)
        total = total + square
    if stages is not None:
        dist.all_reduce(total, group=stages)
    return total.sqrt()


@torch.no_grad()
def clip_(parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients in place by min(1, max_norm / norm), without waiting for the device.

    norm: from `grad_norm` over all of the model's parameters, even if only some are passed here. max_norm: 0 turns
    clipping off. Raises ValueError if it is negative.
    """
    if max_norm < 0:
        raise ValueError(f"max_grad_norm is {max_norm}; the nearest legal value is 0 (no clipping)")
    if max_norm == 0:
        return
    grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if grads:
        torch._foreach_mul_(grads, (max_norm / norm).clamp(max=1.0).to(grads[0].dtype))


def clip_for(optimizer: Any, parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """`clip_` before a step of `optimizer`, which does it itself if it can: a pass less over all gradients."""
    if max_norm > 0 and getattr(optimizer, "divides", False):
        optimizer.grad_divisor = (norm.float() / max_norm).clamp(min=1.0)
    else:
        clip_(parameters, max_norm, norm)


def _sharded_over(parameter: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Process groups of the mesh axes, of more than one rank, over which the tensor is split."""
    if not isinstance(parameter, DTensor):
        return ()
    mesh = parameter.device_mesh
    return tuple(
        mesh.get_group(axis)
        for axis, placement in enumerate(parameter.placements)
        if not placement.is_replicate() and mesh.size(axis) > 1
    )


def _reduced(grad: Tensor) -> Tensor:
    """What this rank holds of a gradient. ValueError if ranks hold only addends of it."""
    if isinstance(grad, DTensor) and any(placement.is_partial() for placement in grad.placements):
        raise ValueError(f"a gradient of shape {tuple(grad.shape)} is not reduced yet: placements {grad.placements}")
    return local(grad)
