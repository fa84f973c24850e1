"""Choose an expert backend for the run's device and precision."""

from __future__ import annotations

from moetrain.moe.experts import grouped_mm, reference
from moetrain.moe.experts.base import ExpertBackend


def build(precision: str, device_type: str, d_model: int, d_expert: int) -> ExpertBackend:
    """grouped_mm for bf16 on a GPU, where it is one kernel, if it takes these widths; reference everywhere else."""
    if device_type == "cuda" and precision == "bf16" and d_model % 8 == 0 and d_expert % 8 == 0:
        return grouped_mm.build(precision, device_type, d_model, d_expert)
    return reference.build(precision, device_type, d_model, d_expert)
