"""torch's grouped matmul over rows sorted by expert."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.experts.permute import gather_rows, reorder, sort_by_expert


class GroupedMMExperts:
    """Two grouped matmuls, gates applied between them: down(gate * a) = gate * down(a), on the narrower tensor's side.

    Unused slots sort behind the last expert's rows. torch leaves those rows of its result, and of its gradient,
    uninitialised; they are overwritten with zeros on both sides so that no NaN leaks (pytorch#193633).
    Widths must be multiples of 16 bytes: torch raises RuntimeError otherwise.
    """

    def __call__(
        self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor
    ) -> Tensor:
        n_experts, slots = w_down_EDF.shape[0], expert_TK.shape[1]
        order_N, place_N, offset_E = sort_by_expert(expert_TK, n_experts)
        unused_N1 = (expert_TK.flatten()[order_N] < 0)[:, None]
        x_ND = gather_rows(x_TD, order_N, place_N, slots).masked_fill(unused_N1, 0.0)
        h_NG = F.grouped_mm(x_ND, w_gate_up_E2FD.flatten(1, 2).transpose(-2, -1), offs=offset_E)
        h_N2F = h_NG.masked_fill(unused_N1, 0.0).unflatten(-1, (2, -1))
        gate_N1 = reorder(gate_TK.flatten(), order_N, place_N)[:, None].to(x_ND.dtype)
        a_NF = (F.silu(h_N2F[:, 0]) * h_N2F[:, 1] * gate_N1).masked_fill(unused_N1, 0.0)
        y_ND = F.grouped_mm(a_NF, w_down_EDF.transpose(-2, -1), offs=offset_E).masked_fill(unused_N1, 0.0)
        return reorder(y_ND, place_N, order_N).view(*expert_TK.shape, x_TD.shape[1]).sum(1)
