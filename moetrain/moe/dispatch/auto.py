"""Choose a dispatcher from the topology and from the bytes it would move."""

from __future__ import annotations

import torch.distributed as dist

from moetrain.comm.nodes import find_nodes
from moetrain.comm.peer import unreachable
from moetrain.moe.dispatch import allgather, collective, copy_engine, local, two_level
from moetrain.moe.dispatch.base import Dispatcher, ExchangeShape
from moetrain.moe.dispatch.chunks import check_chunks

GATHER_FROM = 1.5  # experts per token and rank from which an all-gather moves about what deduplicated rows do


def build(
    n_experts: int,
    group: dist.ProcessGroup | None,
    shape: ExchangeShape,
    chunks: str | int = "auto",
    node_size: str | int = "auto",
) -> Dispatcher:
    """local when this rank has all experts; two_level when they are on several nodes of several ranks; when most ranks
    hold an expert of most tokens copy_engine, or allgather where GPUs do not reach each other; else collective.

    copy_engine moves what allgather does, beside the experts. node_size: as in dispatch=two_level.
    """
    check_chunks(chunks)
    if group is None or group.size() == 1:
        return local.build(n_experts, group, shape)
    ep = group.size()
    nodes = find_nodes(group, shape.device_type, node_size)
    unfit = two_level.unfit(nodes)
    if unfit is None:
        _say("two_level", f"{len(nodes)} nodes of {len(nodes[0])} ranks share ep={ep}")
        return two_level.build(n_experts, group, shape, chunks, node_size)
    gather = shape.top_k >= GATHER_FROM * ep
    comparison = f"top_k={shape.top_k} {'>=' if gather else '<'} {GATHER_FROM} x ep={ep}"
    if len(nodes) > 1:
        comparison += f"; two_level {unfit}"
    if gather and chunks != 1:
        reason: str | None = "needs router.rounding.tile=0"
        if shape.fixed_slots:
            reason = unreachable(group, shape.device_type) if len(nodes) == 1 else "needs one node"
        if reason is None:
            _say("copy_engine", comparison)
            return copy_engine.build(n_experts, group, shape, chunks)
        comparison += f"; copy_engine {reason}"
    _say("allgather" if gather else "collective", comparison)
    return (allgather if gather else collective).build(n_experts, group, shape, chunks)


def _say(name: str, reason: str) -> None:
    if dist.get_rank() == 0:
        print(f"dispatch {name} ({reason})", flush=True)
