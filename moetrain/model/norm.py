"""Root-mean-square normalisation (arXiv:1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.fused import fused


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim. The operator computes in fp32 inside, in fp64 for fp64."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], dtype kept."""
        if fused(x):
            import moetrain_kernels

            return moetrain_kernels.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, (self.dim,), self.weight, self.eps)

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta, and the norm of it."""
        if fused(x):
            import moetrain_kernels

            return moetrain_kernels.add_rms_norm(x, delta, self.weight, self.eps)
        x = x + delta
        return x, self(x)
