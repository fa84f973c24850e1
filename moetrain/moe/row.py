"""Whole rows, where cp and tp ranks hold stretches of them: for choices that look at all tokens of a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.shards import gather_shards


@dataclass(frozen=True)
class Rows:
    """B rows of which this rank holds S of R * S places. group None: it holds all. No gradient passes through."""

    group: dist.ProcessGroup | None
    order_BR: Tensor  # place in the gathered stretches of each place of the row
    own_BS: Tensor  # place in the row of each token here

    def whole(self, x_BS: Tensor) -> Tensor:
        """[B, S, ...] of the tokens here -> [B, R * S, ...] of whole rows in their order. Collective over the group."""
        if self.group is None:
            return x_BS.detach()
        gathered = gather_shards(x_BS.detach(), 1, self.group)
        return gathered.take_along_dim(self.order_BR.view(*self.order_BR.shape, *[1] * (x_BS.dim() - 2)), 1)

    def own(self, x_BR: Tensor) -> Tensor:
        """[B, R * S, ...] -> [B, S, ...]: what belongs to the tokens here."""
        if self.group is None:
            return x_BR
        return x_BR.take_along_dim(self.own_BS.view(*self.own_BS.shape, *[1] * (x_BR.dim() - 2)), 1)


def whole_rows(index_BS: Tensor, group: dist.ProcessGroup | None) -> Rows:
    """index_BS: where each token here stands in the global batch (TokenContext.index_BS). Collective over `group`."""
    if group is None:
        return Rows(None, index_BS, index_BS)
    gathered_BR = gather_shards(index_BS, 1, group)
    sorted_BR, order_BR = gathered_BR.sort(dim=1)
    return Rows(group, order_BR, torch.searchsorted(sorted_BR, index_BS))
