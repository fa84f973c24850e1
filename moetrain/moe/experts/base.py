"""What an expert backend computes. A backend is any callable with this signature; it holds no parameters.

Weights, one block per expert of this rank: w_gate_up_E2FD [E, 2, F, D] (0 the gate, 1 the up projection) and
w_down_EDF [E, D, F]. expert_e(x) = w_down_e (silu(w_gate_e x) * (w_up_e x)).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ExpertBackend(Protocol):
    """y_t = sum_k gate_tk * expert_{expert_tk}(x_t); a slot with expert -1 contributes nothing.

    x_TD, expert_TK int64 in [-1, E), gate_TK -> y_TD in x's dtype. Differentiable in x, gates, and both weights; every
    weight gets a gradient (zeros if unused), also when T is 0, because sharded gradients are reduced collectively.
    """

    def __call__(
        self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor
    ) -> Tensor: ...
