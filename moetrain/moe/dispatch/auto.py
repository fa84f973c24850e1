"""Choose a dispatcher from the topology."""

from __future__ import annotations

import torch.distributed as dist

from moetrain.moe.dispatch import collective, local
from moetrain.moe.dispatch.base import Dispatcher


def build(n_experts: int, group: dist.ProcessGroup | None) -> Dispatcher:
    """local when this rank has all experts, else collective."""
    module = local if group is None or group.size() == 1 else collective
    return module.build(n_experts, group)
