"""The layout changes the speed, never the numbers: every layout against a single process.

fp64 because routing is a discrete choice: in fp32 a correct program drifts apart by chance once one choice flips. So
fp32 is held to its first step only.
"""

import pytest
import torch

from moetrain.moe.experts.pieces import CallPieces
from moetrain.parallel import fsdp
from moetrain.testing import run_ranks
from moetrain.testing.small import SMALL_MODEL
from moetrain.testing.trajectory import compare, flips, record

pytestmark = pytest.mark.distributed
STEPS, BAR, FIRST_STEP_FP32 = 20, 1e-9, 1e-5
LAYOUTS = {  # world, degrees, steps: 20 where experts and the rest are divided otherwise, to see whether errors grow
    "dp2": (2, [], 5),
    "ep2": (2, ["parallel.ep=2"], STEPS),
    "dp4": (4, [], 5),
    "dp4 ep2": (4, ["parallel.ep=2"], 5),
    "dp4 ep4": (4, ["parallel.ep=4"], 5),
    "dp2x2 replicated": (4, ["parallel.dp_replicate=2"], 5),
    "dp2x2 replicated ep2": (4, ["parallel.dp_replicate=2", "parallel.ep=2"], STEPS),
}


def overrides(documents, run_dir, *more, world=1, precision="fp64"):
    # Two micro-steps everywhere, so accumulation takes part.
    rows = 8 // (2 * world)
    options = [f"run.dir={run_dir}", f"train.precision={precision}", f"train.micro_batch={rows}"]
    return [*SMALL_MODEL, *documents, *options, *more]


def alone(options, steps):
    """One process: a forked one too, so that this one never starts the threads that forking would break."""
    return run_ranks(record, 1, options, steps)[0]


@pytest.fixture(scope="module")
def single(documents, tmp_path_factory):
    return alone(overrides(documents, tmp_path_factory.mktemp("single")), STEPS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process_in_fp64(name, documents, single, tmp_path):
    world, degrees, steps = LAYOUTS[name]
    run, weights = run_ranks(record, world, overrides(documents, tmp_path, *degrees, world=world), steps)[0]
    reference = single[0][:steps]
    difference = compare(run, reference)
    print(f"{name}: {difference}")
    assert difference.loss < BAR, difference
    assert difference.norm < BAR, difference
    assert difference.gradient < BAR, difference
    assert flips(run, reference) == 0
    for key, weight in single[1].items() if steps == STEPS else ():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=BAR)


def test_micro_batches_change_nothing(documents, single, tmp_path):
    run, _ = alone([*overrides(documents, tmp_path), "train.micro_batch=1"], 5)
    difference = compare(run, single[0][:5])
    assert max(difference.loss, difference.norm, difference.gradient) < BAR, difference


def test_the_first_step_in_fp32(documents, tmp_path):
    single, _ = alone(overrides(documents, tmp_path / "single", precision="fp32"), 1)
    degrees = ["parallel.dp_replicate=2", "parallel.ep=2"]
    run, _ = run_ranks(record, 4, overrides(documents, tmp_path / "run", *degrees, world=4, precision="fp32"), 1)[0]
    difference = compare(run, single)
    assert max(difference.loss, difference.norm, difference.gradient) < FIRST_STEP_FP32, difference


@pytest.mark.parametrize("fault", ["mean instead of sum", "experts doubled", "local balance counts"])
def test_a_broken_reduction_is_noticed(fault, documents, single, tmp_path, monkeypatch):
    """The proof above is only worth something if it fails when a reduction is wrong."""
    more = []
    if fault == "mean instead of sum":
        monkeypatch.setattr(fsdp.FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)
    elif fault == "experts doubled":
        plain = CallPieces._gradients
        monkeypatch.setattr(CallPieces, "_gradients", lambda work, piece, dy: plain(work, piece, 2 * dy))
    else:
        more = ["balance.switch.scope=micro_batch"]
        from moetrain.moe.balance import switch

        monkeypatch.setattr(switch, "all_reduce_sum", lambda x, group: x.clone())
        single = alone([*overrides(documents, tmp_path / "single"), *more], 2)
    options = [*overrides(documents, tmp_path / "run", "parallel.ep=2", world=2), *more]
    run, _ = run_ranks(record, 2, options, 2)[0]
    difference = compare(run, single[0][:2])
    assert max(difference.loss, difference.norm, difference.gradient) > 1e-6, f"{fault} went unnoticed: {difference}"
