"""The yardstick: one expert after the other, any dtype, nothing clever."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class ReferenceExperts:
    """Loops over experts. An expert without tokens multiplies zero rows, so that its weights still get a gradient."""

    def __call__(
        self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor
    ) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        # unbind, not indexing: the gradient of w[e] is a whole [E, ...] of zeros for each expert.
        for expert, (w_gate_up_2FD, w_down_DF) in enumerate(zip(w_gate_up_E2FD.unbind(), w_down_EDF.unbind())):
            token_N, slot_N = torch.where(expert_TK == expert)
            h_N2F = F.linear(x_TD[token_N], w_gate_up_2FD.flatten(0, 1)).unflatten(-1, (2, -1))
            y_ND = F.linear(F.silu(h_N2F[:, 0]) * h_N2F[:, 1], w_down_DF)
            weighted_ND = y_ND * gate_TK[token_N, slot_N, None].to(y_ND.dtype)
            y_TD = y_TD.index_add(0, token_N, weighted_ND)
        return y_TD


def build(precision: str, device_type: str, d_model: int, d_expert: int) -> ReferenceExperts:
    """Runs everywhere."""
    return ReferenceExperts()
