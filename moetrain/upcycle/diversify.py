"""Expert-diversify: each copied expert loses random weights ("EvoMoE: An Evolutional Mixture-of-Experts Training
Framework via Dense-To-Sparse Gate")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.upcycle.base import DenseFFN, Upcycle, generator


@dataclass(frozen=True)
class Diversify(Upcycle):
    """A share `mask` of each expert's weights, chosen weight by weight, becomes 0; mask 0 is `copy`, else not exact."""

    mask: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask <= 1:
            raise ValueError(f"upcycle.mask={self.mask}; nearest legal value: {min(max(self.mask, 0), 1)}")

    def expert(self, ffn: DenseFFN, layer: int, expert: int, seed: int) -> DenseFFN:
        random = generator(seed, layer, expert, "mask")

        def masked(weight: Tensor) -> Tensor:
            return weight * (torch.rand(weight.shape, generator=random) >= self.mask)

        return DenseFFN(masked(ffn.w_gate_FD), masked(ffn.w_up_FD), masked(ffn.w_down_DF))
