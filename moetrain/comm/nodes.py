"""Which ranks of a group share a node: GPUs that read each other's memory; without GPUs, processes of one host."""

from __future__ import annotations

import socket
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist


def find_nodes(group: dist.ProcessGroup, device_type: str, node_size: str | int = "auto") -> list[list[int]]:
    """Ranks of `group`, node by node, the same on all. Collective.

    node_size: how many consecutive ranks share a node, "auto" to look; a smaller number than there are forbids peer
    access between parts of a host. Raises ValueError for a number that does not divide the group.
    """
    if node_size != "auto":
        if isinstance(node_size, (bool, str)) or node_size < 1 or group.size() % node_size:
            reason = f"dispatch.node_size={node_size!r} does not divide parallel.ep={group.size()}"
            raise ValueError(f"{reason}; nearest legal value: auto (or {group.size()})")
        return [list(range(first, first + node_size)) for first in range(0, group.size(), node_size)]
    mine = (socket.gethostname(), torch.cuda.current_device() if device_type == "cuda" else -1)
    places: list[Any] = [None] * group.size()
    dist.all_gather_object(places, mine, group=group)
    reach = tuple(rank for rank, place in enumerate(places) if _reaches(mine, place))
    reaches: list[Any] = [None] * group.size()
    dist.all_gather_object(reaches, reach, group=group)
    nodes: dict[tuple[int, ...], list[int]] = {}
    for rank, found in enumerate(reaches):
        nodes.setdefault(found, []).append(rank)
    return list(nodes.values())


def _reaches(mine: tuple[str, int], other: tuple[str, int]) -> bool:
    if mine[0] != other[0]:
        return False
    return mine[1] == other[1] or torch.cuda.can_device_access_peer(mine[1], other[1])


def irregular(nodes: list[list[int]]) -> str | None:
    """Why these nodes are no blocks of equally many consecutive ranks; None if they are."""
    sizes = {len(node) for node in nodes}
    if len(sizes) > 1:
        return f"finds nodes of {', '.join(map(str, sorted(sizes)))} ranks in the ep group"
    ranks = [rank for node in nodes for rank in node]
    return None if all(a + 1 == b for a, b in pairwise(ranks)) else "finds nodes whose ranks are not consecutive"


def node_group(group: dist.ProcessGroup, nodes: list[list[int]]) -> dist.ProcessGroup:
    """The ranks of `group` on this rank's node. Collective over the node."""
    mine = next(node for node in nodes if group.rank() in node)
    ranks = [dist.get_global_rank(group, rank) for rank in mine]
    made = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made
