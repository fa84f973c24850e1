"""Let `experts=auto` choose: rank 0 measures for the shapes that every rank has, all ranks compute with its choice."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from moetrain.config.schema import Config
from moetrain.mesh.layout import Layout
from moetrain.moe.experts.base import Undecided, Workload
from moetrain.moe.layer import MoELayer


def workload(config: Config, layout: Layout) -> Workload:
    """What one rank's experts are given in one micro-step of this run."""
    train, moe = config.train, config.model.moe
    rows = train.micro_batch or train.global_batch // layout.dp
    return Workload(
        tokens=rows * train.seq_len // (layout.cp * layout.tp) * layout.ep * layout.etp,
        top_k=moe.top_k,
        n_experts=moe.n_experts,
        local_experts=moe.n_experts // layout.ep,
        d_model=config.model.d_model,
        d_expert=moe.d_expert // layout.etp,
        precision=train.precision,
    )


def settle_experts(model: nn.Module, config: Config, layout: Layout, device: torch.device) -> str:
    """Decide for the backend that the model's MoE layers share; returns a line about the choice, "" if none was open.

    Collective. Before a pipeline keeps some layers only: every rank still has a MoE layer, so every rank takes part.
    With run.deterministic no clock is looked at.
    """
    backends = {id(m.experts.backend): m.experts.backend for m in model.modules() if isinstance(m, MoELayer)}
    lines = []
    for backend in backends.values():
        if isinstance(backend, Undecided):
            name, line = _on_rank0(backend, workload(config, layout), device, not config.run.deterministic)
            backend.use(name)
            lines.append(line)
    return "; ".join(lines)


def _on_rank0(backend: Undecided, load: Workload, device: torch.device, timed: bool) -> tuple[str, str]:
    """Rank 0's decision on every rank; RuntimeError on every rank if it could not decide."""
    said: list[tuple[str, str]] = [("", "")]
    if dist.get_rank() == 0:
        try:
            said = [backend.decide(load, device, timed)]
        except RuntimeError as error:
            said = [("", str(error))]
    dist.broadcast_object_list(said, src=0)
    name, line = said[0]
    if not name:
        raise RuntimeError(line)
    return name, line
