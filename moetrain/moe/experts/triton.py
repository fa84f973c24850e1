"""The Triton kernels of moetrain_kernels: fused gather, SwiGLU, and weighted combine (docs/kernels.md)."""

from __future__ import annotations

import moetrain_kernels
from torch import Tensor

from moetrain.moe.experts.base import Wanted

PRECISIONS = ("fp32", "bf16")


class TritonExperts:
    """Keeps only x and the pre-activation for the backward pass; no host synchronisation; repeats are bit-equal."""

    def __call__(
        self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor
    ) -> Tensor:
        return moetrain_kernels.moe_experts(x_TD, expert_TK, gate_TK, w_gate_up_E2FD, w_down_EDF)

    def divide(self, weights: tuple[Tensor, Tensor], wanted: Wanted | None) -> moetrain_kernels.ExpertPieces:
        """Weight gradients of all pieces in one kernel each; first halves end at the activations."""
        return moetrain_kernels.ExpertPieces(*(w.detach() for w in weights), wanted)


def build(precision: str, device_type: str, d_model: int, d_expert: int) -> TritonExperts:
    """Raises ValueError for fp64 and where the kernels cannot run."""
    if precision not in PRECISIONS:
        raise ValueError(f"experts=triton with train.precision={precision}; nearest legal value: experts=reference")
    usable, reason = moetrain_kernels.available()
    if not usable:
        raise ValueError(f"experts=triton cannot run here ({reason}); nearest legal value: experts=reference")
    return TritonExperts()
