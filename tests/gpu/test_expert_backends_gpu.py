"""Training with experts=triton and experts=auto on a GPU, against experts=reference.

One run records its routing and the others replay it, so that what remains is rounding.

fp32: a gradient's relative error is eps = 1.2e-7 times the square root of its longest sum (512 tokens: 23), 3e-6; 20
steps add at most 20 such errors, 6e-5 (as in tests/distributed/test_tape.py). bf16: how far rounding moves a run is
measured by the reference itself, in bf16 against fp32; another backend may be as far, and a factor of two is left for
chance: in loss and norm over all steps, in gradients for the first (single gradients of later steps are mostly noise).
"""

import pytest
import torch

from moetrain.moe.experts import auto, measure
from moetrain.moe.experts.base import Workload
from moetrain.testing import run_ranks
from moetrain.testing.small import SMALL_MODEL, write_documents
from moetrain.testing.trajectory import compare, record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS, BAR_FP32 = 20, 6e-5


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"))


def train(documents, run_dir, *more):
    options = [f"run.dir={run_dir}", "train.micro_batch=4", *more]
    return run_ranks(record, 1, [*SMALL_MODEL, *documents, *options], STEPS, backend="nccl")[0][0]


@pytest.fixture(scope="module")
def recorded(documents, tmp_path_factory):
    where = tmp_path_factory.mktemp("recorded")
    options = ["experts=reference", "train.precision=fp32", f"router.record={where / 'tape'}"]
    return train(documents, where / "run", *options), where / "tape"


@pytest.mark.parametrize("more", [["experts=triton"], ["experts=triton", "router.kernels=triton"]], ids=str)
def test_fp32_follows_the_reference(more, documents, recorded, tmp_path):
    run = train(documents, tmp_path, *more, "train.precision=fp32", f"router.replay={recorded[1]}")
    difference = compare(run, recorded[0])
    print(f"{more} fp32: {difference}, {sum(step.row['routing_flips'] for step in run)} choices would have flipped")
    assert max(difference.loss, difference.norm, difference.gradient) < BAR_FP32, difference


@pytest.mark.parametrize("experts", ["triton", "auto"])
def test_bf16_is_as_near_to_fp32_as_the_reference(experts, documents, recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("MOETRAIN_CACHE", str(tmp_path / "cache"))
    replay = ["train.precision=bf16", f"router.replay={recorded[1]}"]
    reference = train(documents, tmp_path / "one", "experts=reference", *replay)
    run = train(documents, tmp_path / "two", f"experts={experts}", *replay)
    for steps, names in ((1, ["gradient"]), (STEPS, ["loss", "norm"])):
        yardstick = compare(reference[:steps], recorded[0][:steps])
        difference = compare(run[:steps], recorded[0][:steps])
        print(f"{experts} bf16, {steps} steps: {difference}; reference {yardstick}")
        for name in names:
            assert getattr(difference, name) < 2 * getattr(yardstick, name), name
    assert experts != "auto" or len(list((tmp_path / "cache" / "experts").glob("*.json"))) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_auto_measures_once_and_the_kernels_pass(precision, tmp_path, monkeypatch):
    monkeypatch.setenv("MOETRAIN_CACHE", str(tmp_path))
    load = Workload(4096, 4, 16, 8, 512, 256, precision)
    name, line = auto.build(precision, "cuda", 512, 256).decide(load, torch.device("cuda"))
    print(line)
    assert "triton refused" not in line
    assert "triton not timed" not in line
    monkeypatch.setattr(measure, "median_ms", None)
    again, line = auto.build(precision, "cuda", 512, 256).decide(load, torch.device("cuda"))
    assert again == name
    assert "measured before" in line
