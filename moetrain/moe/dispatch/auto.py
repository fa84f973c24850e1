"""Choose a dispatcher from the topology and from the bytes it would move."""

from __future__ import annotations

import torch.distributed as dist

from moetrain.moe.dispatch import allgather, collective, local
from moetrain.moe.dispatch.base import Dispatcher, ExchangeShape

GATHER_FROM = 1.5  # experts per token and rank from which an all-gather moves about what deduplicated rows do


def build(
    n_experts: int, group: dist.ProcessGroup | None, shape: ExchangeShape, chunks: str | int = "auto"
) -> Dispatcher:
    """local when this rank has all experts; allgather when most ranks hold one of most tokens; else collective."""
    if group is None or group.size() == 1:
        return local.build(n_experts, group, shape)
    ep = group.size()
    gather = shape.top_k >= GATHER_FROM * ep
    if dist.get_rank() == 0:
        reason = f"top_k={shape.top_k} {'>=' if gather else '<'} {GATHER_FROM} x ep={ep}"
        print(f"dispatch {'allgather' if gather else 'collective'} ({reason})", flush=True)
    return (allgather if gather else collective).build(n_experts, group, shape, chunks)
