"""Choose an expert backend for the run's device and precision."""

from __future__ import annotations

from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.experts.grouped_mm import GroupedMMExperts
from moetrain.moe.experts.reference import ReferenceExperts


def build(precision: str, device_type: str) -> ExpertBackend:
    """grouped_mm for bf16 on a GPU, where it runs as one kernel; reference everywhere else."""
    if device_type == "cuda" and precision == "bf16":
        return GroupedMMExperts()
    return ReferenceExperts()
