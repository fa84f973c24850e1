"""Mistakes put in on purpose, to show that a test would notice them."""

from __future__ import annotations

from torch import Tensor


def doubled(x: Tensor) -> Tensor:
    """`x` with twice its gradient, like a sum that counts every rank's part two times."""
    if x.requires_grad:
        x.register_hook(lambda grad: 2 * grad)
    return x
