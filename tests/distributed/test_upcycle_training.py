"""Upcycled models learn more than their dense parent in the same further steps; every layout makes the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moetrain.checkpoint.lazy import stored
from moetrain.checkpoint.use import resolve
from moetrain.testing.ranks import run_ranks
from moetrain.testing.upcycle_run import WAYS, Plan, compare, upcycle

pytestmark = pytest.mark.distributed


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.make() for name, tensor in stored(resolve(run) / "model").items()}


def test_children_end_below_their_parent(tmp_path):
    """One of the three seeds of docs/upcycling.md, half as long."""
    losses = compare(tmp_path, 0, Plan(parent_steps=80, steps=30))
    assert losses["dense"] < losses["parent"] - 0.03  # there was something left to learn
    for way in WAYS:
        assert losses[way.name] < losses["dense"], losses

    parent = tmp_path / "parent-0"
    for way, ranks in zip(WAYS, (1, 4, 4)):  # converted above by two ranks
        want = tensors(tmp_path / f"{way.name}-0")
        out = tmp_path / f"{way.name}-by-{ranks}"
        run_ranks(upcycle, ranks, parent, out, way, 0)
        got = tensors(out)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
