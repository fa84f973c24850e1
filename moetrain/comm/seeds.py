"""Random numbers of a step, for plugins that draw some: nothing to save, and a resume draws the same again."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist


def seed_step(seed: int, step: int) -> None:
    """Seed torch's global generators of every device by (seed, step, rank), before the step draws.

    Ranks draw different numbers, so what a plugin makes of them is the same again under the same layout only. One that
    wants the same under every layout seeds a generator of its own by the token's place in the global batch.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{dist.get_rank()}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
