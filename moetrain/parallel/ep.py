"""Expert parallelism: each rank of the ep mesh keeps an equal block of the experts, and tokens travel to them."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from moetrain.config.plugins import build_plugin
from moetrain.mesh.build import Meshes
from moetrain.moe.layer import MoELayer


def apply_ep(model: nn.Module, meshes: Meshes, dispatch: dict) -> None:
    """Divide the experts of every MoE layer along E and give the layer its dispatcher and its counting group.

    Parameters must still be on the meta device: only their shapes are divided, values come later by name.
    """
    group = meshes.ep.get_group()
    for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
        n_experts = layer.experts.w_down.shape[0]
        for name, parameter in list(layer.experts.named_parameters()):
            assert parameter.is_meta, f"experts.{name} was materialised before it was divided"
            block = torch.empty(
                n_experts // meshes.ep.size(), *parameter.shape[1:], dtype=parameter.dtype, device="meta"
            )
            divided = DTensor.from_local(block, meshes.ep, [Shard(0)], run_check=False)
            layer.experts.register_parameter(name, nn.Parameter(divided))
        layer.dispatcher = build_plugin("dispatch", dispatch, n_experts=n_experts, group=group)
        for plugin in layer.plugins().values():
            plugin.tokens, plugin.row = meshes.tokens, meshes.row
