"""What the first pass through a MoE layer decided, for the passes that recompute its activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Kept:
    """One micro-batch's decisions in one layer, empty until its first pass. parallel/recompute.py makes one a forward.

    A recomputed pass takes them over: a choice made again could differ by rounding, and would then have its gradient
    taken at other experts than its loss; counts and balance losses taken again would count twice.

    expert_TK: the chosen experts. keep_TK: those that capacity did not drop.
    rows: row counts that an exchange learnt from other ranks, which needs no second one: the dispatcher's own.
    work: None before the exchange's first pass, then what its recomputed pass leaves for the backward pass.
    """

    expert_TK: Tensor | None = None
    keep_TK: Tensor | None = None
    rows: Any = None
    work: list[Any] | None = None


@contextmanager
def kept_graph() -> Iterator[None]:
    """What autograd saves inside is kept, also within a region whose activations are recomputed."""
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        yield
