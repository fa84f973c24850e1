"""Experts that move between ranks change no number: every loss, norm, and gradient equals one process (fp64)."""

import pytest
import torch

from moetrain.moe import placement
from moetrain.moe.experts.module import Experts
from moetrain.parallel import placement as moves
from moetrain.testing import run_ranks
from moetrain.testing.small import SMALL_MODEL
from moetrain.testing.trajectory import flips, open_trainer, record, record_steps, worst

pytestmark = pytest.mark.distributed
STEPS, BAR = 20, 1e-9
ON = ["dispatch.placement.every=2", "dispatch.placement.threshold=1.0"]
PP = ["parallel.pp=2", "train.micro_batch=2"]
LAYOUTS = {
    "ep4": (["parallel.ep=4"], 20),
    "ep2 edp2": (["parallel.ep=2"], 6),
    "ep2 etp2": (["parallel.ep=2", "parallel.etp=2"], 6),
    "ep2 replicated": (["parallel.ep=2", "parallel.dp_replicate=2", "dispatch=allgather"], 4),
    "ep2 pp2": (["parallel.ep=2", *PP, "parallel.schedule=interleaved", "parallel.pp_layers=[1,1,1,0]"], 6),
    "ep4 tp2 cp2 recomputed": (["parallel.ep=4", "parallel.tp=2", "parallel.cp=2", "parallel.recompute=full"], 6),
}
LAYOUTS["ep2 pp2"] = (["parallel.ep=2", *PP], 6)


def overrides(documents, run_dir, *more, micro_batch=1):
    options = [f"run.dir={run_dir}", "train.precision=fp64", f"train.micro_batch={micro_batch}"]
    return [*SMALL_MODEL, *documents, *options, *more]


@pytest.fixture(scope="module")
def single(documents, tmp_path_factory):
    return run_ranks(record, 1, overrides(documents, tmp_path_factory.mktemp("one"), micro_batch=8), STEPS)[0][0]


@pytest.fixture
def shuffled(monkeypatch):
    """Plans that move nearly every expert each time, whatever the load: a function of counts that all ranks know."""

    def shuffle(count_E, slot_E, ranks):
        return slot_E[torch.randperm(len(slot_E), generator=torch.Generator().manual_seed(int(count_E[0])))]

    monkeypatch.setattr(placement, "swapped", shuffle)


def moved(run):
    return sum(step.row.get("experts_moved", 0) for step in run)


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process(name, documents, single, tmp_path, shuffled):
    degrees, steps = LAYOUTS[name]
    run, _ = run_ranks(record, 4, overrides(documents, tmp_path, *ON, *degrees), steps)[0]
    assert moved(run) >= 2 * steps  # of 2 layers with 8 experts, in steps / 2 decisions
    assert worst(run, single) < BAR
    assert flips(run, single) == 0
