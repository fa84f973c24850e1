"""Drop-Upcycling: part of each copied expert starts afresh ("Drop-Upcycling: Training Sparse Mixture of Experts with
Partial Re-initialization")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.upcycle.base import DenseFFN, Upcycle, generator


@dataclass(frozen=True)
class Drop(Upcycle):
    """floor(ratio * F) hidden neurons of each expert are drawn anew, from N(mean, std^2) of the entries they replace.

    shared_indices: the same neurons in gate, up, and down, as the paper has it; its released code draws them per
    matrix. Not exact unless ratio is 0, when it is `copy`.
    """

    ratio: float = 0.5
    shared_indices: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"upcycle.ratio={self.ratio}; nearest legal value: {min(max(self.ratio, 0), 1)}")

    def expert(self, ffn: DenseFFN, layer: int, expert: int, seed: int) -> DenseFFN:
        random = generator(seed, layer, expert, "drop")
        width = ffn.w_gate_FD.shape[0]
        count = int(self.ratio * width)
        chosen = torch.randperm(width, generator=random)[:count]

        def redraw(weight: Tensor) -> Tensor:
            which = chosen if self.shared_indices else torch.randperm(width, generator=random)[:count]
            return _redraw(weight, which, random)

        gate_FD, up_FD = redraw(ffn.w_gate_FD), redraw(ffn.w_up_FD)
        return DenseFFN(gate_FD, up_FD, redraw(ffn.w_down_DF.T).T)


def _redraw(weight_FD: Tensor, rows_n: Tensor, random: torch.Generator) -> Tensor:
    if not len(rows_n):
        return weight_FD
    old_nD = weight_FD[rows_n].double()
    fresh_nD = torch.empty(old_nD.shape, dtype=torch.float64).normal_(0.0, 1.0, generator=random)
    fresh_nD = fresh_nD * old_nD.std(correction=0) + old_nD.mean()
    return weight_FD.index_copy(0, rows_n, fresh_nD.to(weight_FD.dtype))
