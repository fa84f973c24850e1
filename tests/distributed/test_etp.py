"""Slices of experts on several ranks: every gradient equals one process, with and without ep, dp, and replicas."""

import pytest

from moetrain.moe.dispatch import sliced
from moetrain.testing import run_ranks
from moetrain.testing.faults import doubled
from moetrain.testing.small import SMALL_MODEL
from moetrain.testing.trajectory import flips, record, worst

pytestmark = pytest.mark.distributed
STEPS, BAR = 20, 1e-9
LAYOUTS = {
    "etp2": (2, ["parallel.etp=2"], 5),  # ep=1, where peers got the gradients wrong
    "etp2 ep2": (4, ["parallel.etp=2", "parallel.ep=2"], 20),
    "etp2 edp2": (4, ["parallel.etp=2"], 5),
    "etp2 edp2 replicated": (4, ["parallel.etp=2", "parallel.dp_replicate=2"], 5),
    "etp4": (4, ["parallel.etp=4"], 5),
}


def overrides(documents, run_dir, *more, world=1):
    options = [f"run.dir={run_dir}", "train.precision=fp64", f"train.micro_batch={4 // world}"]
    return [*SMALL_MODEL, *documents, *options, *more]


@pytest.fixture(scope="module")
def single(documents, tmp_path_factory):
    return run_ranks(record, 1, overrides(documents, tmp_path_factory.mktemp("single")), STEPS)[0][0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process(name, documents, single, tmp_path):
    world, degrees, steps = LAYOUTS[name]
    run, _ = run_ranks(record, world, overrides(documents, tmp_path, *degrees, world=world), steps)[0]
    assert worst(run, single) < BAR
    assert flips(run, single) == 0


@pytest.mark.parametrize("fault", ["experts doubled", "partial sums kept"])
def test_a_broken_reduction_is_noticed(fault, documents, single, tmp_path, monkeypatch):
    plain = sliced.sum_scatter
    if fault == "experts doubled":
        monkeypatch.setattr(sliced, "sum_scatter", lambda x, *a: doubled(plain(x, *a)))
    else:
        monkeypatch.setattr(sliced, "sum_scatter", lambda x, dim, group: x.chunk(2)[group.rank()])
    run, _ = run_ranks(record, 2, overrides(documents, tmp_path, "parallel.etp=2", world=2), 2)[0]
    assert worst(run, single) > 1e-6, f"{fault} went unnoticed"
