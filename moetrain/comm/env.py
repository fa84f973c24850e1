"""What torchrun's environment says, without importing torch: verbs that need no tensors start at once."""

from __future__ import annotations

import os


def world_size() -> int:
    """Ranks of this launch: torchrun's WORLD_SIZE, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank0() -> bool:
    """Whether this process speaks for the launch."""
    return int(os.environ.get("RANK", "0")) == 0
