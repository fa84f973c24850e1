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
        expert_TK = expert_TK.masked_fill(expert_TK >= n_experts, -1)
        order_N, place_N, offset_E = sort_by_expert(expert_TK, n_experts)
        unused_N1 = (expert_TK.flatten()[order_N] < 0)[:, None]
        x_ND = gather_rows(x_TD, order_N, place_N, slots).masked_fill(unused_N1, 0.0)
        h_NG = F.grouped_mm(x_ND, w_gate_up_E2FD.flatten(1, 2).transpose(-2, -1), offs=offset_E)
        h_N2F = h_NG.masked_fill(unused_N1, 0.0).unflatten(-1, (2, -1))
        gate_N1 = reorder(gate_TK.flatten(), order_N, place_N)[:, None].to(x_ND.dtype)
        a_NF = (F.silu(h_N2F[:, 0]) * h_N2F[:, 1] * gate_N1).masked_fill(unused_N1, 0.0)
        y_ND = F.grouped_mm(a_NF, w_down_EDF.transpose(-2, -1), offs=offset_E).masked_fill(unused_N1, 0.0)
        return reorder(y_ND, place_N, order_N).view(*expert_TK.shape, x_TD.shape[1]).sum(1)


ITEM_BYTES = {"fp32": 4, "bf16": 2}


def build(precision: str, device_type: str, d_model: int, d_expert: int) -> GroupedMMExperts:
    """Raises ValueError for what torch's kernel cannot take: fp64, and rows that are not multiples of 16 bytes."""
    if precision not in ITEM_BYTES:
        raise ValueError(f"experts=grouped_mm with train.precision={precision}; nearest legal value: experts=reference")
    step = 16 // ITEM_BYTES[precision]
    for key, width in (("model.d_model", d_model), ("model.moe.d_expert", d_expert)):
        if width % step:
            nearest = max(step, round(width / step) * step)
            raise ValueError(
                f"{key}={width} is not a multiple of 16 bytes for experts=grouped_mm; nearest legal value: {nearest}"
            )
    return GroupedMMExperts()
