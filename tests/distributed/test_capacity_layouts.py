"""Capacity looks at whole rows: what is dropped, and every gradient, is the same under every layout (fp64)."""

import pytest

from moetrain.moe import capacity
from moetrain.moe.row import Rows
from moetrain.testing import run_ranks
from moetrain.testing.small import SMALL_MODEL, write_documents
from moetrain.testing.trajectory import compare, record

pytestmark = pytest.mark.distributed
STEPS, BAR = 3, 1e-9
LAYOUTS = {
    "probability": (4, ["parallel.tp=2", "parallel.cp=2", "parallel.ep=4"], 1),
    "position": (2, ["parallel.ep=2", "dispatch=collective", "dispatch.capacity.pad=true"], 2),
    "batch_priority": (2, ["parallel.cp=2", "parallel.ep=2", "parallel.recompute=full"], 1),
    "random": (2, ["parallel.tp=2", "parallel.etp=2"], 1),
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"))


def train(documents, run_dir, drop, world, dp, *more):
    options = [f"run.dir={run_dir}", "train.precision=fp64", f"train.micro_batch={4 // dp}"]
    options += ["dispatch.capacity.factor=0.8", f"dispatch.capacity.drop={drop}", "dispatch.capacity.renormalize=true"]
    return run_ranks(record, world, [*SMALL_MODEL, *documents, *options, *more], STEPS)[0][0]


@pytest.mark.parametrize("drop", LAYOUTS)
def test_layouts_drop_the_same(drop, documents, tmp_path):
    world, degrees, dp = LAYOUTS[drop]
    single = train(documents, tmp_path / "single", drop, 1, 1)
    run = train(documents, tmp_path / "run", drop, world, dp, *degrees)
    difference = compare(run, single)
    print(drop, difference)
    assert max(difference.loss, difference.norm, difference.gradient) < BAR, difference
    shares = [key for key in single[0].row if key.endswith("dropped_share")]
    assert shares
    for mine, theirs in zip(run, single):
        assert all(0.01 < theirs.row[key] < 0.9 and mine.row[key] == theirs.row[key] for key in shares)


def test_parts_of_rows_are_noticed(documents, tmp_path, monkeypatch):
    """Ranks that look at their stretch of the row only drop other choices."""
    single = train(documents, tmp_path / "single", "probability", 1, 1)
    monkeypatch.setattr(capacity, "whole_rows", lambda index, group: Rows(None, index, index))
    difference = compare(train(documents, tmp_path / "run", "probability", 2, 1, "parallel.cp=2"), single)
    assert difference.gradient > 1e-6
