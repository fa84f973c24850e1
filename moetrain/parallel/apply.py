"""The order in which parallelisms are applied to a model."""

from __future__ import annotations

import torch

from moetrain.config.schema import Config
from moetrain.mesh.build import Meshes
from moetrain.model.build import build_model
from moetrain.model.decoder import Decoder
from moetrain.parallel.ep import apply_ep
from moetrain.parallel.fsdp import apply_fsdp
from moetrain.parallel.initialize import initialise, materialise
from moetrain.parallel.recompute import apply_recompute

MASTER_DTYPE = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.float32}


def build_parallel_model(config: Config, meshes: Meshes, device: torch.device) -> Decoder:
    """The model, divided over the meshes and initialised, with master weights on `device`."""
    with torch.device("meta"):
        model = build_model(config, device.type)
    apply_ep(model, meshes, config.dispatch)  # 1. which experts are here
    blocks = list(model.layers.values())
    apply_recompute(blocks, config.parallel.recompute)  # 2. what a forward pass stores
    reshard = config.parallel.reshard_after_forward is not False
    apply_fsdp(model, blocks, meshes, config.train.precision, reshard)  # 3. which part of each parameter is here
    materialise(model, device, MASTER_DTYPE[config.train.precision])  # 4. storage for that part
    initialise(model, config.run.seed, config.model.init_std)  # 5. the same values under every layout
    return model
