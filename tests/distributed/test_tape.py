"""Routing recorded by one run and replayed by another, under any layout.

The tolerance of the replayed fp32 run: one gradient's relative error e is eps(fp32) = 1.2e-7 times the square root of
its longest sum (512 tokens: 23), 3e-6; 8 steps of AdamW add at most 8 such errors to the weights' relative path, so
losses, norms, and gradients stay within 8 e = 2.4e-5. A flipped choice is bound by nothing of the kind.
"""

import pytest

from moetrain.testing import run_ranks
from moetrain.testing.small import SMALL_MODEL
from moetrain.testing.trajectory import compare, record

pytestmark = pytest.mark.distributed
STEPS, BAR_FP32 = 8, 2.4e-5


def train(documents, run_dir, world, *more, steps=STEPS):
    rows = 8 // (2 * world)
    options = [f"run.dir={run_dir}", "train.precision=fp32", f"train.micro_batch={rows}"]
    return run_ranks(record, world, [*SMALL_MODEL, *documents, *options, *more], steps)[0][0]


@pytest.fixture(scope="module")
def recorded(documents, tmp_path_factory):
    where = tmp_path_factory.mktemp("recorded")
    return train(documents, where / "run", 1, f"router.record={where / 'tape'}"), where / "tape"


def test_a_layout_with_replayed_routing_stays_near(documents, recorded, tmp_path):
    run = train(documents, tmp_path, 4, "parallel.ep=2", f"router.replay={recorded[1]}")
    difference = compare(run, recorded[0])
    flips = sum(step.row["routing_flips"] for step in run)
    print(difference, flips, "choices would have flipped")
    assert max(difference.loss, difference.norm, difference.gradient) < BAR_FP32, difference
    for mine, theirs in zip(run, recorded[0]):
        loads = [key for key in theirs.row if "load" in key]
        assert loads
        assert all(mine.row[key] == theirs.row[key] for key in loads)


@pytest.mark.parametrize("more", [[], ["parallel.recompute=full"]])
def test_replaying_ones_own_record_changes_no_bit(more, documents, recorded, tmp_path):
    again = tmp_path / "again"
    options = [f"router.replay={recorded[1]}", f"router.record={again}", *more]
    run = train(documents, tmp_path / "run", 1, *options, steps=3)
    for mine, theirs in zip(run, recorded[0]):
        assert mine.row["loss"] == theirs.row["loss"]
        assert mine.row["grad_norm"] == theirs.row["grad_norm"]
        assert mine.row["routing_flips"] == 0
        assert all((mine.gradients[name] == theirs.gradients[name]).all() for name in theirs.gradients)
    name = "step_00000002/rank_00000.safetensors"
    assert (again / name).read_bytes() == (recorded[1] / name).read_bytes()


def test_another_models_choices_are_counted_as_flips(documents, recorded, tmp_path):
    run = train(documents, tmp_path, 2, "run.seed=1", f"router.replay={recorded[1]}", steps=1)
    counted = run[0].row["routing_flips"]
    assert 100 < counted < 2 * 2 * 8 * 64  # of layers x top-k x rows x tokens; a guess is right in 1 of 4 cases


def test_a_record_that_does_not_fit_is_refused(documents, recorded, tmp_path):
    for options, message in (
        (["train.global_batch=16"], "lacks layer 1"),
        (["model.n_layers=4"], "lacks layer 3"),
        ([f"router.replay={tmp_path}"], "lacks layer 1"),
        (["model.moe.top_k=1", "router.renormalize=false"], "router.replay has 2 in layer 1"),
        (["model.moe.n_experts=4"], "router.replay has 8 in layer 1"),
    ):
        with pytest.raises(Exception, match=message):
            train(documents, tmp_path / message, 1, f"router.replay={recorded[1]}", *options, steps=1)


def test_resuming_forgets_what_a_record_had_further_on(documents, recorded, tmp_path):
    tape = tmp_path / "tape"
    for step in (1, 2):
        (tape / f"step_{step:08d}").mkdir(parents=True)
        (tape / f"step_{step:08d}" / "rank_00007.safetensors").write_bytes(b"")
    train(documents, tmp_path / "run", 1, f"router.record={tape}", steps=1)
    left = [path.relative_to(tape).as_posix() for path in tape.rglob("*.safetensors")]
    assert left == ["step_00000001/rank_00000.safetensors"]
