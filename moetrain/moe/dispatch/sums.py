"""What came home for a token from several ranks, added up: gathered, not scattered, so that repeats are bit-equal."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.fused import fused


def sum_rows(row_ND: Tensor, row_TR: Tensor) -> Tensor:
    """[T, D]: for each token the sum of the rows that `row_TR` names, in its order; -1 names none."""
    if fused(row_ND):
        import moetrain_kernels

        return moetrain_kernels.sum_rows(row_ND, row_TR)
    padded_ND = torch.cat([row_ND, row_ND.new_zeros(1, row_ND.shape[1])])  # -1 is its last row
    return padded_ND[row_TR].sum(dim=1)
