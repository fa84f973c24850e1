"""Lazy tensors: written as they are made, and let go of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint.lazy import LazyTensor, stored, write_lazy

pytestmark = pytest.mark.unit
SHAPE, COUNT = torch.Size([4, 1024, 1024]), 10  # 16 MiB each


def _anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_near_a_few_tensors(tmp_path):
    seen = []

    def make(i: int) -> torch.Tensor:
        seen.append(_anonymous_mib())
        return torch.full(SHAPE, float(i))

    lazy = {f"t{i}": LazyTensor(SHAPE, torch.float32, lambda i=i: make(i)) for i in range(COUNT)}
    write_lazy(tmp_path, lazy)
    # One is let go of while the next is written; all ten would be 160 MiB.
    assert max(seen) - seen[0] < 80
    back = stored(tmp_path)
    assert sorted(back) == sorted(lazy)
    assert all(torch.equal(back[f"t{i}"].make(), torch.full(SHAPE, float(i))) for i in range(0, COUNT, 3))
