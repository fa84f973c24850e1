"""A `Decoder` from the typed configuration, plugins included."""

from __future__ import annotations

import torch
from torch import nn

from moetrain.config.plugins import build_plugin, router_options
from moetrain.config.schema import Config
from moetrain.model.decoder import Decoder
from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.experts.module import Experts
from moetrain.moe.layer import MoELayer
from moetrain.moe.shared import SharedExperts


def build_model(config: Config, device_type: str) -> Decoder:
    """The whole model, on torch's current default device: put `torch.device("meta")` around it for a large one."""
    backend: ExpertBackend | None = None

    def build_moe(layer: int) -> nn.Module:
        nonlocal backend
        model, moe = config.model, config.model.moe
        if backend is None:  # one for all layers: choosing may time candidates, and the choice is printed once
            backend = build_backend(config, device_type)
        with torch.device("cpu"):  # a plugin's buffers start with values, which the meta device would lose
            balance = {
                name: build_plugin(f"balance.{name}", node, n_experts=moe.n_experts)
                for name, node in config.balance.items()
            }
        shared = SharedExperts(model.d_model, moe.d_shared, moe.shared_gate) if moe.d_shared else None
        router = build_plugin("router", router_options(config.router), d_model=model.d_model, n_experts=moe.n_experts)
        return MoELayer(router, Experts(moe.n_experts, model.d_model, moe.d_expert, backend), balance, shared)

    return Decoder(config.model, build_moe, documents=config.data.documents == "stop")


def build_backend(config: Config, device_type: str) -> ExpertBackend:
    """The expert backend of `experts=` for this run's shapes, precision, and device."""
    width = config.model.moe.d_expert // config.parallel.etp  # of the slice that this rank multiplies
    shapes = {"d_model": config.model.d_model, "d_expert": width}
    return build_plugin("experts", config.experts, precision=config.train.precision, device_type=device_type, **shapes)
