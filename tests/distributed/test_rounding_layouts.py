"""Token rounding looks at whole rows, so ranks that share a row must agree: every layout equals one process in fp64."""

import pytest

from moetrain.moe.router import rounding
from moetrain.testing import run_ranks
from moetrain.testing.small import SMALL_MODEL, write_documents
from moetrain.testing.trajectory import compare, record

pytestmark = pytest.mark.distributed
STEPS, BAR = 4, 1e-9
# 64 tokens a row, 2 of 8 experts each: 16 a row for an expert on average.
ROUNDING = ["router.rounding.tile=8", "train.precision=fp64"]
LAYOUTS = {
    "ep2": (2, ["parallel.ep=2"]),
    "tp2": (2, ["parallel.tp=2"]),
    "cp2": (2, ["parallel.cp=2"]),
    "tp2 cp2 ep4": (4, ["parallel.tp=2", "parallel.cp=2", "parallel.ep=4"]),
    "pp2": (2, ["parallel.pp=2", "train.micro_batch=2"]),
    "micro-batches": (1, ["train.micro_batch=1"]),
    "recomputed": (1, ["parallel.recompute=full"]),
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"))


def train(world, documents, run_dir, *more, steps=STEPS):
    return run_ranks(record, world, [*SMALL_MODEL, *documents, *ROUNDING, f"run.dir={run_dir}", *more], steps)[0][0]


@pytest.fixture(scope="module")
def single(documents, tmp_path_factory):
    return train(1, documents, tmp_path_factory.mktemp("single"))


def worst(run, single):
    difference = compare(run, single)
    print(difference)
    return max(difference.loss, difference.norm, difference.gradient)


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process(name, documents, single, tmp_path):
    world, degrees = LAYOUTS[name]
    assert worst(train(world, documents, tmp_path, *degrees), single) < BAR


def test_it_is_not_plain_top_k(documents, single, tmp_path):
    assert worst(train(1, documents, tmp_path, "router.rounding.tile=0", steps=2), single[:2]) > 1e-6


def test_a_rank_that_rounds_its_own_part_of_a_row_is_noticed(documents, single, tmp_path, monkeypatch):
    plain = rounding.TokenRounding._keep

    def alone(self, *args):
        self.row = None
        return plain(self, *args)

    monkeypatch.setattr(rounding.TokenRounding, "_keep", alone)
    assert worst(train(2, documents, tmp_path, "parallel.cp=2", steps=2), single[:2]) > 1e-6
