"""A NaN or exploded loss on one rank changes no weight and no checkpoint, and every rank does the same about it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from moetrain.checkpoint import manifest
from moetrain.checkpoint.store import CheckpointStore
from moetrain.testing import RankFailure, run_ranks
from moetrain.testing.small import SMALLEST_MODEL
from moetrain.testing.trajectory import new_trainer

pytestmark = pytest.mark.distributed
TINY = [
    "experiment=quickstart",
    *SMALLEST_MODEL,
    "train.micro_batch=1",
    "train.eval_every=0",
    "train.steps=8",
    "balance=[switch,z_loss,bias]",
    "parallel.ep=2",
    "run.log_samples=true",
    "checkpoint.keep=0",
]


def run(overrides, poisoned=(), times=1, weights_at=None, before=lambda: None):
    """Two ranks; rank 1's loss is NaN in the steps `poisoned`, the first `times` times that each is tried.

    before: what happens then, on rank 0.
    """

    def rank():
        trainer = new_trainer([*TINY, *overrides])
        plain, notes, tried = trainer._accumulate, [], {}
        trainer.log.note = notes.append

        def poison(work):
            now = trainer.step + 1
            tried[now] = tried.get(now, 0) + 1
            if now in poisoned and tried[now] <= times and not trainer.rank0:
                with torch.no_grad():
                    work = list(work)
                    criterion = work[0].criterion
                    object.__setattr__(work[0], "criterion", lambda *a, **k: criterion(*a, **k) * float("nan"))
            if now in poisoned and trainer.rank0:
                before()
            total = plain(work)
            if now == weights_at:
                trainer.model.get_parameter("norm.weight").data.fill_(float("nan"))
            return total

        trainer._accumulate = poison
        try:
            trainer.fit()
        finally:
            trainer.close()
        return notes

    return run_ranks(rank, 2)


def rows(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def ids(run_dir, step):
    return {row["dp"]: row["ids"] for row in rows(run_dir, "samples.jsonl") if row["step"] == step}


def files(run_dir, step):
    listed = manifest.read(run_dir / "checkpoints" / f"step_{step:08d}")["files"]
    return {name: entry for name, entry in listed.items() if name != "trainer.json"}


def state(run_dir, step):
    return json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "trainer.json").read_text())


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("clean")
    run([f"run.dir={run_dir}"])
    return run_dir


def test_stop_names_the_batch_and_leaves_the_last_good_checkpoint(tmp_path, clean):
    with pytest.raises(RankFailure, match="step 5: loss nan") as caught:
        run([f"run.dir={tmp_path}", "checkpoint.every=2"], poisoned=[5])
    for dp, names in ids(clean, 5).items():
        assert f"dp {dp}: {', '.join(names)}" in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_skip_leaves_every_bit_and_the_stream_as_they_were(tmp_path, clean):
    overrides = [f"run.dir={tmp_path}", "checkpoint.every=1", "train.on_bad_step=skip"]
    notes = run(overrides, poisoned=[4])
    assert [note for note in notes[0] if "step 4: loss nan" in note and "skip" in note]
    assert files(tmp_path, 4) == files(tmp_path, 3) != files(tmp_path, 2)  # weights, moments, biases: to the byte
    assert state(tmp_path, 3)["bad_steps"] == 0
    assert state(tmp_path, 8)["bad_steps"] == 1
    assert rows(tmp_path, "samples.jsonl") == rows(clean, "samples.jsonl")
    by_step = {row["step"]: row for row in rows(tmp_path)}
    assert list(by_step) == list(range(1, 9))
    assert [step for step, row in by_step.items() if row.get("skipped")] == [4]
    assert by_step[4]["loss"] is None
    assert by_step[4]["nonfinite"]["loss"] == "nan"
    assert by_step[3]["loss"] == rows(clean)[2]["loss"]
    assert by_step[5]["loss"] is not None


def test_balance_counts_of_a_skipped_step_do_not_reach_the_next(tmp_path):
    """What follows it equals a fresh process that begins at the checkpoint of the skipped step."""
    options = [f"run.dir={tmp_path}", "train.steps=5", "checkpoint.every=4", "train.on_bad_step=skip"]
    options += ["balance=[switch]", "balance.switch.scope=global_batch", "balance.switch.coefficient=1"]
    run(options, poisoned=[4])
    after = rows(tmp_path)[-1]
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000005")
    run(options)
    again = rows(tmp_path)[-1]
    assert after["step"] == again["step"] == 5
    assert after["aux/switch"] == again["aux/switch"]


def test_roll_back_goes_on_from_the_checkpoint_with_the_data_behind_the_bad_batch(tmp_path, clean):
    notes = run([f"run.dir={tmp_path}", "checkpoint.every=3", "train.on_bad_step=rollback"], poisoned=[5])
    assert [note for note in notes[1] if "step 5: loss nan" in note and "rollback" in note]
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == [1, 2, 3, 3, 4, 5, 6, 7, 8]
    assert logged[3]["event"] == "rollback"
    assert logged[3]["bad_step"] == 5
    assert [row["loss"] for row in logged[:3]] == [row["loss"] for row in rows(clean)[:3]]
    for step, from_step in ((3, 3), (4, 6), (5, 7), (6, 8)):
        assert ids(tmp_path, step) == ids(clean, from_step)
    assert state(tmp_path, 8)["bad_steps"] == 1
    assert state(tmp_path, 8)["data"]["samples"] == 4 * 10  # two steps' samples were given up


def test_roll_back_keeps_the_mixtures_stages_to_their_steps(tmp_path):
    overrides = [f"run.dir={tmp_path}", "checkpoint.every=3", "train.on_bad_step=rollback"]
    overrides += [
        "+data.sources={late: {kind: stdlib, weight: 0}}",
        "data.mixture=[{from_step: 5, weights: {late: 1}}]",
    ]
    run(overrides, poisoned=[5])
    read = {
        step: {name.split(":")[0] for of_dp in ids(tmp_path, step).values() for name in of_dp} for step in range(1, 9)
    }
    assert read == {step: {"late"} if step > 5 else {"stdlib"} for step in range(1, 9)}  # from_step counts from 0
    assert state(tmp_path, 8)["data"]["step"] == 8


def test_roll_back_passes_over_a_checkpoint_that_is_damaged(tmp_path):
    def flip():
        damaged = next((tmp_path / "checkpoints" / "step_00000004" / "model").glob("__0_*"))
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1  # the size stays
        damaged.write_bytes(data)

    overrides = [f"run.dir={tmp_path}", "checkpoint.every=2", "train.on_bad_step=rollback"]
    notes = run(overrides, poisoned=[5], before=flip)
    assert [note for note in notes[0] if "step_00000004 is damaged and not used" in note and "__0_" in note]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 2, 3, 4, 5, 6, 7, 8]
    newest = CheckpointStore(tmp_path).latest(deep=True)
    assert newest is not None
    assert newest.name == "step_00000008"


def test_bad_steps_are_bounded_and_an_exploded_loss_is_one(tmp_path):
    """A fresh byte model has a loss of about ln(264) = 5.6."""
    overrides = [f"run.dir={tmp_path}", "train.on_bad_step=skip", "train.max_bad_steps=2", "train.max_loss=1"]
    with pytest.raises(RankFailure, match=r"step 3: loss 5\.\d+ .*above train.max_loss=1\)"):
        run(overrides)
    assert [row["skipped"] for row in rows(tmp_path)] == [1, 1]


def test_weights_that_are_not_finite_reach_no_checkpoint(tmp_path):
    """The step's own loss was fine; with the learning rate at a sane value only a broken update does this."""
    with pytest.raises(RankFailure, match="weights are not finite after step 4: no checkpoint of it is written"):
        run([f"run.dir={tmp_path}", "checkpoint.every=2"], weights_at=4)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
