"""What differs between two checkpoints, tensor by tensor; two whole tensors are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.checkpoint import manifest
from moetrain.checkpoint.lazy import LazyTensor, stored

_CHUNK = 1 << 22  # elements compared at a time, in fp64


def differences(a: Path, b: Path) -> Iterator[str]:
    """A line for each tensor and each entry of trainer.json that is not the same in two step directories.

    Layouts may differ: names and shapes are global. Raises ValueError for a checkpoint that is damaged or unreadable.
    """
    for part in ("model", "optim"):
        mine, theirs = stored(a / part), stored(b / part)
        for name in sorted(mine.keys() | theirs.keys()):
            line = _tensor(mine.get(name), theirs.get(name))
            if line:
                yield f"{part}/{name}: {line}"
    first, second = (dict(_flat("", manifest.trainer_state(path))) for path in (a, b))
    for key in sorted(first.keys() | second.keys()):
        x, y = (str(side.get(key, "nothing")) for side in (first, second))
        if x != y:
            yield f"trainer.json {key}: {x} in the first, {y} in the second"


def count(path: Path) -> int:
    """Tensors of a step directory."""
    return sum(len(stored(path / part)) for part in ("model", "optim"))


def _tensor(a: LazyTensor | None, b: LazyTensor | None) -> str:
    if a is None or b is None:
        return "only in the second" if a is None else "only in the first"
    if a.shape != b.shape:
        return f"shape {tuple(a.shape)} in the first, {tuple(b.shape)} in the second"
    different, largest, relative = _compare(a.make(), b.make())
    dtype = "" if a.dtype == b.dtype else f"{a.dtype} in the first, {b.dtype} in the second"
    if not different:
        return dtype
    of = f"{different} of {a.shape.numel()} elements, max abs {largest:.3g}, max rel {relative:.3g}"
    return f"{dtype}; {of}" if dtype else of


def _compare(a: Tensor, b: Tensor) -> tuple[int, float, float]:
    """Elements that differ, and their largest absolute and relative difference (to the larger of the two)."""
    different, largest, relative = 0, 0.0, 0.0
    for x, y in zip(a.flatten().split(_CHUNK), b.flatten().split(_CHUNK)):
        x, y = x.double(), y.double()
        unequal = (x != y) & ~(x.isnan() & y.isnan())
        if not unequal.any():
            continue
        x, y = x[unequal], y[unequal]
        gap = (x - y).abs().nan_to_num(torch.inf, torch.inf)  # NaN against a number is as far as can be
        scale = torch.maximum(x.abs(), y.abs()).nan_to_num(1.0)
        different += int(unequal.sum())
        largest = max(largest, float(gap.max()))
        relative = max(relative, float((gap / scale).nan_to_num(torch.inf, torch.inf).max()))
    return different, largest, relative


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, value
