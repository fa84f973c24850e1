"""Expert parallelism: ranks keep equal blocks of the experts (ep) or equal slices of each expert (etp).

Tokens travel to the block's ranks, and there to all ranks that hold slices of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from moetrain.config.plugins import build_plugin, dispatch_options
from moetrain.config.schema import Config
from moetrain.mesh.build import Meshes
from moetrain.mesh.layout import Layout
from moetrain.moe.capacity import Capacity, rows_bound
from moetrain.moe.dispatch.base import Dispatcher, ExchangeShape
from moetrain.moe.dispatch.sliced import SlicedDispatch
from moetrain.moe.layer import MoELayer

COMPUTE_DTYPE = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
EXPERT_WIDTH_DIM = {"w_gate_up": 2, "w_down": 2}  # the F of w_gate_up [E, 2, F, D] and w_down [E, D, F]
EXPERT_MODEL_DIM = {"w_gate_up": 3, "w_down": 1}  # the D


def apply_ep(model: nn.Module, meshes: Meshes, config: Config) -> None:
    """Divide the experts of every MoE layer along E and F; give them the dispatcher and the layer its counting groups.

    Parameters must still be on the meta device: only their shapes are divided, values come later by name.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    if not layers:
        return
    n_experts = next(iter(layers.values())).experts.w_down.shape[0]
    capacity = make_capacity(config, n_experts)
    shape = exchange_shape(config, meshes.layout, meshes.expert.device_type, capacity)
    runtime = {"n_experts": n_experts, "group": meshes.ep.get_group(), "shape": shape}
    dispatcher: Dispatcher = build_plugin("dispatch", dispatch_options(config.dispatch), **runtime)
    if meshes.layout.etp > 1:
        dispatcher = SlicedDispatch(dispatcher, meshes.expert.get_group("etp"))
    for number, layer in layers.items():
        layer.capacity = make_capacity(config, n_experts, number)
        if layer.capacity is not None:
            layer.capacity.row = meshes.row
        assert layer.experts.w_down.shape[0] == n_experts
        for name, parameter in list(layer.experts.named_parameters()):
            assert parameter.is_meta, f"experts.{name} was materialised before it was divided"
            divided = _divide(parameter, EXPERT_WIDTH_DIM[name], meshes)
            layer.experts.register_parameter(name, nn.Parameter(divided))
        layer.experts.dispatcher = dispatcher
        rounding = getattr(layer.router, "rounding", None)  # of routers that have it: moe/router/rounding.py
        for plugin in [*layer.plugins().values(), *([rounding] if rounding else [])]:
            plugin.tokens, plugin.row = meshes.tokens, meshes.row


def make_capacity(config: Config, n_experts: int, layer: str = "") -> Capacity | None:
    """Of one layer, by its name in the model; None without a capacity. Raises ValueError for a wrong option."""
    options = config.dispatch.get("capacity", {})
    if not options.get("factor"):
        return None
    return build_plugin("dispatch.capacity", options, n_experts=n_experts, seed=(config.run.seed, layer))


def exchange_shape(config: Config, layout: Layout, device_type: str, capacity: Capacity | None = None) -> ExchangeShape:
    """What each rank routes in a micro-step."""
    rows = config.train.micro_batch or config.train.global_batch // layout.dp
    parts, top_k = layout.cp * layout.tp, config.model.moe.top_k
    stretch = config.train.seq_len // parts
    bound = None
    if capacity is not None and capacity.pad:
        bound = rows_bound(capacity, rows, stretch, config.train.seq_len, top_k, layout.ep)
    dtype = COMPUTE_DTYPE[config.train.precision]
    fixed = not (config.router.get("rounding") or {}).get("tile")
    return ExchangeShape(rows * stretch, config.model.d_model, top_k, dtype, device_type, bound, fixed)


def _divide(parameter: Tensor, width_dim: int, meshes: Meshes) -> DTensor:
    """This rank's block of experts, of each of them its slice when there are several."""
    shape = list(parameter.shape)
    shape[0] //= meshes.layout.ep
    shape[width_dim] //= meshes.layout.etp
    block = torch.empty(shape, dtype=parameter.dtype, device="meta")
    if meshes.layout.etp == 1:
        return DTensor.from_local(block, meshes.ep, [Shard(0)], run_check=False)
    return DTensor.from_local(block, meshes.expert["ep", "etp"], [Shard(0), Shard(width_dim)], run_check=False)
