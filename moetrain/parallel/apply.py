"""The order in which parallelisms are applied to a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from moetrain.config.schema import Config
from moetrain.mesh.build import Meshes
from moetrain.model.build import build_model
from moetrain.model.decoder import Decoder
from moetrain.moe.balance.base import Balance
from moetrain.moe.layer import MoELayer
from moetrain.parallel.compile import apply_compile
from moetrain.parallel.cp import apply_cp
from moetrain.parallel.ep import apply_ep
from moetrain.parallel.experts import settle_experts
from moetrain.parallel.fsdp import apply_fsdp
from moetrain.parallel.initialize import initialise, materialise
from moetrain.parallel.pp import Pipeline, Stage, carry_width, cut, keep_stages
from moetrain.parallel.recompute import apply_recompute
from moetrain.parallel.tp import apply_tp

MASTER_DTYPE = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.float32}


@dataclass(frozen=True)
class ParallelModel:
    """This rank's part of the model.

    model: holds all parameters that are here under the whole model's names. pipeline: runs it in stages, None for one.
    loss_names: the balance plugins with a loss, of every layer, here or not. experts: a line about what experts=auto
    chose, or nothing.
    """

    model: Decoder
    pipeline: Pipeline | None
    loss_names: list[str]
    experts: str


def build_parallel_model(config: Config, meshes: Meshes, device: torch.device) -> ParallelModel:
    """The model, divided over the meshes and initialised, with master weights on `device`."""
    with torch.device("meta"):
        model = build_model(config, device.type)
    names, width = loss_names(model), carry_width(model)
    chosen = settle_experts(model, config, meshes.layout, device)  # 0. which kernels multiply experts
    stages = divide(model, config, meshes)
    parts: list[Decoder] = [*stages] or [model]
    for part in parts:
        materialise(part, device, MASTER_DTYPE[config.train.precision])  # 9. storage for what is here
    if not config.init.get("from") or config.init.get("allow"):  # else a checkpoint overwrites every one of them
        initialise(model, config.run.seed, config.model.init_std)  # 10. the same values under every layout
    pipeline = Pipeline(config, meshes, stages, width, device) if stages else None
    return ParallelModel(model, pipeline, names, chosen)


def divide(model: Decoder, config: Config, meshes: Meshes) -> list[Stage]:
    """Leave this rank's part of a model on the meta device; returns its pipeline stages, none without a pipeline."""
    piped = config.parallel.pp > 1
    mine = keep_stages(model, config, meshes) if piped else []  # 1. which layers are here
    apply_tp(model, meshes)  # 2. which heads, columns, and words are here
    apply_ep(model, meshes, config)  # 3. which experts are here
    apply_cp(model, meshes, config.parallel.cp_method)  # 4. which positions of a row are here
    apply_compile(model, config.parallel.compile)  # 5. what is compiled
    apply_recompute(list(model.layers.values()), config.parallel.recompute)  # 6. what a forward pass stores
    stages = cut(model, config, mine) if piped else []  # 7. what runs as one piece
    reshard = not piped and config.parallel.reshard_after_forward is not False
    parts: list[Decoder] = [*stages] or [model]
    for part in parts:
        blocks = list(part.layers.values())
        apply_fsdp(part, blocks, meshes, config.train.precision, reshard)  # 8. which part of each parameter is here
    return stages


def loss_names(model: nn.Module) -> list[str]:
    """Names of the balance plugins that have a loss."""
    plugins = [item for layer in model.modules() if isinstance(layer, MoELayer) for item in layer.plugins().items()]
    return sorted({name for name, plugin in plugins if type(plugin).on_routing is not Balance.on_routing})
