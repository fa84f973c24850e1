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
    """This rank's meshes, and the groups that the rest of the code asks for by purpose.

    attention, expert: the two numberings of mesh/layout.py.
    dense: the attention numbering as dense parameters see it, [pp, dp_replicate, fsdp, tp]: dp_shard and cp together
    shard them, because both hold the same parameters and different tokens.
    dense_fsdp, expert_fsdp: what `fully_shard` takes: [shard], or [replicate, shard] when there are replicas.
    data: the stage's ranks that read different tokens (dp x cp); a step's losses and counts are summed over them.
    row: the ranks that hold stretches of the same rows (cp x tp); None if this rank holds whole rows.
    tokens: the stage's ranks whose MoE layers route different tokens (dp x cp x tp).
    """

    layout: Layout
    attention: DeviceMesh
    dense: DeviceMesh
    expert: DeviceMesh
    dense_fsdp: DeviceMesh
    expert_fsdp: DeviceMesh
    data: dist.ProcessGroup
    tokens: dist.ProcessGroup
    row: dist.ProcessGroup | None

    @property
    def ep(self) -> DeviceMesh:
        """The ranks that share one set of experts."""
        return self.expert["ep"]

    @property
    def cp(self) -> DeviceMesh:
        """The ranks that read the same rows and keep different positions of them."""
        return self.attention["cp"]

    @property
    def dp_rank(self) -> int:
        """Which share of the global batch this rank reads, 0 <= dp_rank < layout.dp."""
        replicate = self.attention.get_local_rank("dp_replicate")
        return replicate * self.layout.dp_shard + self.attention.get_local_rank("dp_shard")


def build_meshes(layout: Layout, device_type: str) -> Meshes:
    """Create every process group of `layout`. Collective: all ranks call it with the same layout."""
    assert dist.get_world_size() == layout.world, f"world {dist.get_world_size()} is not the layout's {layout.world}"
    pp, tp, data = layout.pp, layout.tp, layout.dp * layout.cp
    row = layout.cp * tp
    fsdp = {"pp": pp, "dp_replicate": layout.dp_replicate, "fsdp": layout.dp_shard * layout.cp, "tp": tp}
    dense = _mesh(fsdp, device_type)
    expert = _mesh(layout.expert, device_type)
    return Meshes(
        layout=layout,
        attention=_mesh(layout.attention, device_type),
        dense=dense,
        expert=expert,
        dense_fsdp=_with_replicas(dense, "dp_replicate", "fsdp"),
        expert_fsdp=_with_replicas(expert, "edp_replicate", "edp_shard"),
        data=_mesh({"pp": pp, "data": data, "tp": tp}, device_type).get_group("data"),
        tokens=_mesh({"pp": pp, "tokens": data * tp}, device_type).get_group("tokens"),
        row=_mesh({"rows": layout.world // row, "row": row}, device_type).get_group("row") if row > 1 else None,
    )


def _mesh(degrees: dict[str, int], device_type: str) -> DeviceMesh:
    ranks = torch.arange(math.prod(degrees.values())).view(*degrees.values())
    return DeviceMesh(device_type, ranks, mesh_dim_names=tuple(degrees))


def _with_replicas(mesh: DeviceMesh, replicate: str, shard: str) -> DeviceMesh:
    return mesh[replicate, shard] if mesh[replicate].size() > 1 else mesh[shard]
