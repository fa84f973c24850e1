"""Lazy tensors: written as they are made, and let go of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint.lazy import LazyTensor, stored, write_lazy
from moetrain.testing.memory import anonymous_bytes, in_a_fresh_process

pytestmark = pytest.mark.unit
SHAPE, COUNT = torch.Size([4, 1024, 1024]), 10  # 16 MiB each


def _growth(folder: Path) -> int:
    """Bytes that this process has grown by, at most, when another tensor is asked for."""
    seen = []

    def make(i: int) -> torch.Tensor:
        seen.append(anonymous_bytes())
        return torch.full(SHAPE, float(i))

    write_lazy(folder, {f"t{i}": LazyTensor(SHAPE, torch.float32, lambda i=i: make(i)) for i in range(COUNT)})
    return max(seen) - seen[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_near_a_few_tensors(tmp_path):
    # One is let go of while the next is written; all ten would be 160 MiB.
    assert in_a_fresh_process(_growth, tmp_path) < 80 * 2**20
    back = stored(tmp_path)
    assert sorted(back) == sorted(f"t{i}" for i in range(COUNT))
    assert all(torch.equal(back[f"t{i}"].make(), torch.full(SHAPE, float(i))) for i in range(0, COUNT, 3))
