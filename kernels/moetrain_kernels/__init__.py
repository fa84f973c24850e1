"""Triton kernels for mixture-of-experts models: layers, loss, and update. Imports torch and triton only."""

from . import reference
from .combine import sum_rows
from .dense import swiglu
from .dtypes import convert
from .experts import moe_experts
from .launch import available
from .norm import add_rms_norm, rms_norm
from .pieces import ExpertPieces
from .rotation import norm_rope
from .router import route_topk
from .softmax_loss import cross_entropy
from .update import adamw

__all__ = [
    "ExpertPieces",
    "adamw",
    "add_rms_norm",
    "available",
    "convert",
    "cross_entropy",
    "moe_experts",
    "norm_rope",
    "reference",
    "rms_norm",
    "route_topk",
    "sum_rows",
    "swiglu",
]
