"""Triton kernels for the expert layer of a mixture-of-experts model. Imports torch and triton only."""

from . import reference
from .experts import moe_experts
from .launch import available
from .pieces import ExpertPieces
from .router import route_topk

__all__ = ["ExpertPieces", "available", "moe_experts", "reference", "route_topk"]
