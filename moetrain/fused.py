"""Whether the kernels of moetrain_kernels compute on a tensor: on a GPU that can run them, in anything but fp64."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def fused(x: Tensor) -> bool:
    """fp64 is for proofs, and elsewhere the plain operators are what there is."""
    return x.is_cuda and x.dtype != torch.float64 and _available()


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if fused(gate):
        import moetrain_kernels

        return moetrain_kernels.swiglu(gate, up)
    return F.silu(gate) * up


@torch.compiler.assume_constant_result  # torch.compile need not look inside
def _available() -> bool:
    return _look()


@functools.cache
def _look() -> bool:
    try:
        import moetrain_kernels  # here: not every machine has Triton, and none without a GPU needs it
    except ImportError:
        return False
    return moetrain_kernels.available()[0]
