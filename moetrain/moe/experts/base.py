"""What an expert backend computes. A backend is any callable with this signature; it holds no parameters.

Weights, one block per expert of this rank: w_gate_up_E2FD [E, 2, F, D] (0 the gate, 1 the up projection) and
w_down_EDF [E, D, F]. expert_e(x) = w_down_e (silu(w_gate_e x) * (w_up_e x)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class ExpertBackend(Protocol):
    """y_t = sum_k gate_tk * expert_{expert_tk}(x_t); a slot with expert -1 contributes nothing.

    x_TD, expert_TK int64 in [-1, E), gate_TK -> y_TD in x's dtype. Differentiable in x, gates, and both weights; every
    weight gets a gradient (zeros if unused), also when T is 0, because sharded gradients are reduced collectively.
    """

    def __call__(
        self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor
    ) -> Tensor: ...


@dataclass(frozen=True)
class Workload:
    """What one rank's experts are given in one micro-step, for a backend that measures before it chooses.

    tokens: of all ranks whose tokens can come here. n_experts: all routed experts; local_experts of them are here, each
    with d_expert columns. precision: train.precision.
    """

    tokens: int
    top_k: int
    n_experts: int
    local_experts: int
    d_model: int
    d_expert: int
    precision: str


@runtime_checkable
class Undecided(Protocol):
    """A backend that chooses another one once the shapes and the device of a run are known (parallel/experts.py)."""

    def decide(self, load: Workload, device: torch.device, timed: bool) -> tuple[str, str]:
        """On one rank: the name of the choice, and a line that says why. timed: False must not look at a clock."""

    def use(self, name: str) -> None:
        """On every rank: compute with the backend of this name from now on."""
