"""Expert parallelism: ranks keep equal blocks of the experts (ep) or equal slices of each expert (etp).

Tokens travel to the block's ranks, and there to all ranks that hold slices of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from moetrain.config.plugins import build_plugin
from moetrain.config.schema import Config
from moetrain.mesh.build import Meshes
from moetrain.mesh.layout import Layout
from moetrain.moe.dispatch.base import Dispatcher, ExchangeShape
from moetrain.moe.dispatch.sliced import SlicedDispatch
from moetrain.moe.layer import MoELayer

COMPUTE_DTYPE = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
EXPERT_WIDTH_DIM = {"w_gate_up": 2, "w_down": 2}  # the F of w_gate_up [E, 2, F, D] and w_down [E, D, F]
EXPERT_MODEL_DIM = {"w_gate_up": 3, "w_down": 1}  # the D


def apply_ep(model: nn.Module, meshes: Meshes, config: Config, device_type: str) -> None:
    """Divide the experts of every MoE layer along E and F; give them the dispatcher and the layer its counting groups.

    Parameters must still be on the meta device: only their shapes are divided, values come later by name.
    """
    layers = [m for m in model.modules() if isinstance(m, MoELayer)]
    if not layers:
        return
    n_experts = layers[0].experts.w_down.shape[0]
    shape = exchange_shape(config, meshes.layout, device_type)
    runtime = {"n_experts": n_experts, "group": meshes.ep.get_group(), "shape": shape}
    dispatcher: Dispatcher = build_plugin("dispatch", config.dispatch, **runtime)
    if meshes.layout.etp > 1:
        dispatcher = SlicedDispatch(dispatcher, meshes.expert.get_group("etp"))
    for layer in layers:
        assert layer.experts.w_down.shape[0] == n_experts
        for name, parameter in list(layer.experts.named_parameters()):
            assert parameter.is_meta, f"experts.{name} was materialised before it was divided"
            divided = _divide(parameter, EXPERT_WIDTH_DIM[name], meshes)
            layer.experts.register_parameter(name, nn.Parameter(divided))
        layer.experts.dispatcher = dispatcher
        for plugin in layer.plugins().values():
            plugin.tokens, plugin.row = meshes.tokens, meshes.row


def exchange_shape(config: Config, layout: Layout, device_type: str) -> ExchangeShape:
    """What each rank routes in a micro-step."""
    rows = config.train.micro_batch or config.train.global_batch // layout.dp
    tokens = rows * (config.train.seq_len // (layout.cp * layout.tp))
    dtype = COMPUTE_DTYPE[config.train.precision]
    return ExchangeShape(tokens, config.model.d_model, config.model.moe.top_k, dtype, device_type)


def _divide(parameter: Tensor, width_dim: int, meshes: Meshes) -> DTensor:
    """This rank's block of experts, of each of them its slice when there are several."""
    shape = list(parameter.shape)
    shape[0] //= meshes.layout.ep
    shape[width_dim] //= meshes.layout.etp
    block = torch.empty(shape, dtype=parameter.dtype, device="meta")
    if meshes.layout.etp == 1:
        return DTensor.from_local(block, meshes.ep, [Shard(0)], run_check=False)
    return DTensor.from_local(block, meshes.expert["ep", "etp"], [Shard(0), Shard(width_dim)], run_check=False)
