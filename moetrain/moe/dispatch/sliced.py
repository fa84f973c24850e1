"""Experts cut along their hidden width (expert tensor parallelism): every rank of the etp group holds a slice of each.

The group's ranks have different tokens. So whatever another dispatcher brought to this rank is gathered over the
group, each rank computes its slice's part of every result, and the parts are summed on the way back.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moetrain.comm.shards import gather_shards, sum_scatter
from moetrain.moe.dispatch.base import Dispatcher, Weights
from moetrain.moe.dispatch.chunks import Chunks
from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.types import Routing


class SlicedDispatch:
    """Around any dispatcher. group: the etp ranks, which hold slices of the same experts."""

    def __init__(self, inner: Dispatcher, group: dist.ProcessGroup) -> None:
        self.inner, self.group = inner, group
        chunks = getattr(inner, "chunks", None)
        if isinstance(chunks, Chunks):  # whose number is that of the calls below, which are collective
            chunks.groups.append(group)

    def __call__(self, x_TD: Tensor, routing: Routing, experts: ExpertBackend, weights: Weights) -> Tensor:
        def over_all_slices(
            x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor
        ) -> Tensor:
            return self._compute(x_TD, expert_TK, gate_TK, experts, (w_gate_up_E2FD, w_down_EDF))

        return self.inner(x_TD, routing, over_all_slices, weights)

    def _compute(
        self, x_MD: Tensor, expert_MK: Tensor, gate_MK: Tensor, experts: ExpertBackend, weights: Weights
    ) -> Tensor:
        rows = x_MD.shape[0]
        missing = self._most(rows, x_MD.device) - rows
        # Rows are padded to the group's largest count. Unused slots are a normal input, so padding needs no removal.
        x_MD, gate_MK = F.pad(x_MD, (0, 0, 0, missing)), F.pad(gate_MK, (0, 0, 0, missing))
        expert_MK = F.pad(expert_MK.to(torch.int32), (0, 0, 0, missing), value=-1)
        x_ND = gather_shards(x_MD, 0, self.group)
        gate_NK = gather_shards(gate_MK, 0, self.group)
        expert_NK = gather_shards(expert_MK, 0, self.group).long()
        return sum_scatter(experts(x_ND, expert_NK, gate_NK, *weights), 0, self.group)[:rows]

    def _most(self, rows: int, device: torch.device) -> int:
        """The largest row count in the group, at least 1 because collectives dislike empty tensors. Waits for it."""
        most = torch.tensor(max(rows, 1), device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        return int(most)
