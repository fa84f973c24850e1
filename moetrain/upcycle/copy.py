"""Sparse upcycling: every expert is the dense layer ("Sparse Upcycling: Training MoE from Dense Checkpoints")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.upcycle.base import DenseFFN, Upcycle, generator


@dataclass(frozen=True)
class Copy(Upcycle):
    """Exact with normalized gates and noise 0. With noise, N(0, noise^2) is added to a share of each expert's weights.

    Without normalized gates the down projection is scaled by N/k, exact for a uniform router only.
    """

    noise: float = 0.0
    noise_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise < 0:
            raise ValueError(f"upcycle.noise={self.noise}; nearest legal value: 0")
        if not 0 <= self.noise_share <= 1:
            nearest = min(max(self.noise_share, 0), 1)
            raise ValueError(f"upcycle.noise_share={self.noise_share}; nearest legal value: {nearest}")

    def expert(self, ffn: DenseFFN, layer: int, expert: int, seed: int) -> DenseFFN:
        random = generator(seed, layer, expert, "noise")
        return DenseFFN(*(self._noisy(w, random) for w in (ffn.w_gate_FD, ffn.w_up_FD, ffn.w_down_DF)))

    def _noisy(self, weight: Tensor, random: torch.Generator) -> Tensor:
        if self.noise == 0:
            return weight
        noise = torch.empty(weight.shape).normal_(0.0, self.noise, generator=random)
        hit = torch.rand(weight.shape, generator=random) < self.noise_share
        return weight + (noise * hit).to(weight.dtype)
