"""Triton kernels for mixture-of-experts models: experts, routing, rotation, loss. Imports torch and triton only."""

from . import reference
from .experts import moe_experts
from .launch import available
from .rotation import norm_rope
from .router import route_topk
from .softmax_loss import cross_entropy

__all__ = ["available", "cross_entropy", "moe_experts", "norm_rope", "reference", "route_topk"]
