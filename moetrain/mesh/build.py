"""Turn a `Layout` into torch DeviceMeshes: one numbering for attention, one for experts, over the same ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moetrain.mesh.layout import Layout


@dataclass(frozen=True)
class Meshes:
    """This rank's meshes and the groups that the rest of the code asks for by purpose.

    dense_fsdp, expert_fsdp: what `fully_shard` takes: [shard], or [replicate, shard] when there are replicas.
    ep: 1-D mesh of the ranks that share one set of experts.
    tokens: group of the stage's ranks that hold different tokens (all of them, as long as tp=1).
    """

    layout: Layout
    attention: DeviceMesh
    expert: DeviceMesh
    dense_fsdp: DeviceMesh
    expert_fsdp: DeviceMesh
    ep: DeviceMesh
    tokens: dist.ProcessGroup

    @property
    def dp_rank(self) -> int:
        """Which share of the global batch this rank reads, 0 <= dp_rank < layout.dp."""
        replicate = self.attention.get_local_rank("dp_replicate")
        return replicate * self.layout.dp_shard + self.attention.get_local_rank("dp_shard")


def build_meshes(layout: Layout, device_type: str) -> Meshes:
    """Create every process group of `layout`. Collective: all ranks call it with the same layout."""
    assert dist.get_world_size() == layout.world, f"world {dist.get_world_size()} is not the layout's {layout.world}"
    assert layout.tp == layout.cp == layout.pp == layout.etp == 1, "axes that validate.py refuses"
    attention = _mesh(layout.attention, device_type)
    expert = _mesh(layout.expert, device_type)
    everyone = dist.group.WORLD
    assert everyone is not None
    return Meshes(
        layout=layout,
        attention=attention,
        expert=expert,
        dense_fsdp=_fsdp_mesh(attention, "dp_replicate", "dp_shard"),
        expert_fsdp=_fsdp_mesh(expert, "edp_replicate", "edp_shard"),
        ep=expert["ep"],
        tokens=everyone,
    )


def _mesh(degrees: dict[str, int], device_type: str) -> DeviceMesh:
    ranks = torch.arange(math.prod(degrees.values())).view(*degrees.values())
    return DeviceMesh(device_type, ranks, mesh_dim_names=tuple(degrees))


def _fsdp_mesh(mesh: DeviceMesh, replicate: str, shard: str) -> DeviceMesh:
    return mesh[replicate, shard] if mesh[replicate].size() > 1 else mesh[shard]
