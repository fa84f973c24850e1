"""Names that differ between the supported torch versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

# torch 2.13 renamed both and warns of the old names.
all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
