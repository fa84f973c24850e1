"""The layers that the benchmark compares, all with the signature of moetrain_kernels.moe_experts.

Other projects join the table when their package is installed: peers.py.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from moetrain_kernels import moe_experts
from peers import PEERS, Layer
from torch.nn import functional


def _experts_of_rows(x_RD, w_gate_up_E2FD, w_down_EDF, ends_E):
    w_up = w_gate_up_E2FD.flatten(1, 2).transpose(1, 2)
    gate_RF, up_RF = torch._grouped_mm(x_RD, w_up, offs=ends_E).chunk(2, dim=1)
    return torch._grouped_mm(functional.silu(gate_RF) * up_RF, w_down_EDF.transpose(1, 2), offs=ends_E)


def grouped_mm(x_TD, expert_TK, gate_TK, w_gate_up_E2FD, w_down_EDF):
    """Sort, gather, torch's grouped matmul, weight, sum: what one writes without kernels of one's own."""
    top_k = expert_TK.shape[1]
    expert_S = expert_TK.reshape(-1)
    slot_R = torch.argsort(expert_S, stable=True)
    ids_E = torch.arange(w_down_EDF.shape[0], device=x_TD.device)
    ends_E = torch.searchsorted(expert_S[slot_R], ids_E, right=True).to(torch.int32)
    y_RD = _experts_of_rows(x_TD[slot_R // top_k], w_gate_up_E2FD, w_down_EDF, ends_E)
    y_RD = y_RD * gate_TK.reshape(-1)[slot_R].to(y_RD.dtype)[:, None]
    y_SD = torch.empty_like(y_RD).index_copy(0, slot_R, y_RD)
    return y_SD.view(*expert_TK.shape, -1).sum(1)


BACKENDS: dict[str, Layer] = {
    "triton": Layer(moe_experts),
    "grouped_mm": Layer(grouped_mm),
    "grouped_mm compiled": Layer(torch.compile(grouped_mm)),
    **PEERS,
}


def missing(layer: Layer) -> list[str]:
    """The modules that a layer needs and this machine lacks."""
    return [name for name in layer.needs if find_spec(name) is None]
