"""Sparse upcycling: every expert is the dense layer ("Sparse Upcycling: Training MoE from Dense Checkpoints")."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.upcycle.base import DenseFFN, Upcycle, generator


class Copy(Upcycle):
    """Exact with normalized gates and noise 0. With noise, N(0, noise^2) is added to a share of each expert's weights.

    Without normalized gates the down projection is scaled by N/k, exact for a uniform router only.
    """

    def __init__(
        self,
        experts: int,
        top_k: int,
        granularity: int = 1,
        normalized: bool = True,
        router_std: float = 0.02,
        noise: float = 0.0,
        noise_share: float = 0.5,
    ) -> None:
        super().__init__(experts, top_k, granularity, normalized, router_std)
        self.refuse_granularity("copy")
        if noise < 0:
            raise ValueError(f"upcycle.noise={noise}; nearest legal value: 0")
        if not 0 <= noise_share <= 1:
            raise ValueError(f"upcycle.noise_share={noise_share}; nearest legal value: {min(max(noise_share, 0), 1)}")
        self.noise, self.noise_share = noise, noise_share
        self.scale = 1.0 / (self.top_k * self.gate())

    def d_expert(self, d_ff: int) -> int:
        return d_ff

    def expert(self, ffn: DenseFFN, layer: int, expert: int, seed: int) -> DenseFFN:
        random = generator(seed, layer, expert, "noise")
        gate_FD, up_FD, down_DF = (self._noisy(w, random) for w in (ffn.w_gate_FD, ffn.w_up_FD, ffn.w_down_DF))
        return DenseFFN(gate_FD, up_FD, down_DF if self.scale == 1.0 else down_DF * self.scale)

    def _noisy(self, weight: Tensor, random: torch.Generator) -> Tensor:
        if self.noise == 0:
            return weight
        noise = torch.empty(weight.shape).normal_(0.0, self.noise, generator=random)
        hit = torch.rand(weight.shape, generator=random) < self.noise_share
        return weight + (noise * hit).to(weight.dtype)
