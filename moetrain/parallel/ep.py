"""Expert parallelism: ranks keep equal blocks of the experts (ep) or equal slices of each expert (etp).

Tokens travel to the block's ranks, and there to all ranks that hold slices of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from moetrain.config.plugins import build_plugin
from moetrain.mesh.build import Meshes
from moetrain.moe.dispatch.base import Dispatcher
from moetrain.moe.dispatch.sliced import SlicedDispatch
from moetrain.moe.layer import MoELayer

EXPERT_WIDTH_DIM = {"w_gate_up": 2, "w_down": 2}  # the F of w_gate_up [E, 2, F, D] and w_down [E, D, F]
EXPERT_MODEL_DIM = {"w_gate_up": 3, "w_down": 1}  # the D


def apply_ep(model: nn.Module, meshes: Meshes, dispatch: dict) -> None:
    """Divide the experts of every MoE layer along E and F and give the layer its dispatcher and its counting group.

    Parameters must still be on the meta device: only their shapes are divided, values come later by name.
    """
    for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
        n_experts = layer.experts.w_down.shape[0]
        for name, parameter in list(layer.experts.named_parameters()):
            assert parameter.is_meta, f"experts.{name} was materialised before it was divided"
            divided = _divide(parameter, EXPERT_WIDTH_DIM[name], meshes)
            layer.experts.register_parameter(name, nn.Parameter(divided))
        dispatcher: Dispatcher = build_plugin("dispatch", dispatch, n_experts=n_experts, group=meshes.ep.get_group())
        sliced = meshes.layout.etp > 1
        layer.dispatcher = SlicedDispatch(dispatcher, meshes.expert.get_group("etp")) if sliced else dispatcher
        rounding = getattr(layer.router, "rounding", None)  # of routers that have it: moe/router/rounding.py
        for plugin in [*layer.plugins().values(), *([rounding] if rounding else [])]:
            plugin.tokens, plugin.row = meshes.tokens, meshes.row


def _divide(parameter: Tensor, width_dim: int, meshes: Meshes) -> DTensor:
    """This rank's block of experts, of each of them its slice when there are several."""
    shape = list(parameter.shape)
    shape[0] //= meshes.layout.ep
    shape[width_dim] //= meshes.layout.etp
    block = torch.empty(shape, dtype=parameter.dtype, device="meta")
    if meshes.layout.etp == 1:
        return DTensor.from_local(block, meshes.ep, [Shard(0)], run_check=False)
    return DTensor.from_local(block, meshes.expert["ep", "etp"], [Shard(0), Shard(width_dim)], run_check=False)
