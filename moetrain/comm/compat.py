"""Names that differ between the supported torch versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# torch 2.13 renamed both and warns of the old names.
all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def graph_is_kept() -> bool:
    """Inside a backward pass: whether it was asked to keep the graph, so that it may be asked for more."""
    return torch._C._autograd._get_current_graph_task_keep_graph()
