"""Which checkpoints stay: the newest, every m-th, the best, and always the newest intact one."""

from __future__ import annotations

import os

import pytest
from torch import nn

from moetrain.checkpoint.retention import Retention, val_loss
from moetrain.checkpoint.store import CheckpointStore
from moetrain.optim import adamw
from moetrain.testing.checkpoints import save_trained

pytestmark = pytest.mark.unit
LOSSES = {10: 5.0, 20: 3.0, 30: None, 40: 3.5, 50: 3.0, 60: 4.0, 70: None}


def _save(run, step, **policy):
    model = nn.Linear(1, 1)
    keeper = CheckpointStore(run, **policy)
    keeper.save(step, model, adamw.build(model.named_parameters(), lr=0.1), {"val_loss": LOSSES[step]}, {})
    return keeper


def _kept(keeper):
    return [int(path.name.split("_")[1]) for path in keeper.steps()]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({}, [10, 20, 30, 40, 50, 60, 70]),
        ({"keep": 1}, [70]),
        ({"keep": 2}, [60, 70]),
        ({"keep": 1, "keep_every": 30}, [30, 60, 70]),
        ({"keep": 1, "keep_best": 1}, [50, 70]),  # of two equal losses the newer
        ({"keep": 2, "keep_best": 3}, [20, 40, 50, 60, 70]),
        ({"keep": 1, "keep_every": 20, "keep_best": 2}, [20, 40, 50, 60, 70]),
    ],
)
def test_policies(tmp_path, policy, kept):
    for step in LOSSES:
        keeper = _save(tmp_path, step, **policy)
        assert keeper.latest() == keeper.root / f"step_{step:08d}"
    assert _kept(keeper) == kept


def test_damaged_steps_are_neither_counted_nor_deleted(tmp_path):
    for step in (10, 20, 30):
        keeper = _save(tmp_path, step)
    os.truncate(keeper.steps()[-1] / "model" / "__0_0.distcp", 3)
    expendable = Retention(keep=1).expendable(keeper.steps())
    assert [path.name for path in expendable] == ["step_00000010"]  # 20 is the newest intact one
    assert val_loss(keeper.steps()[1]) == 3.0


def test_superseded_steps_and_damaged_ones_are_not_counted(tmp_path):
    for step in (1, 2, 3):
        save_trained(tmp_path, step, keep=2)
    keeper = CheckpointStore(tmp_path, keep=2)
    assert [p.name for p in keeper.steps()] == ["step_00000002", "step_00000003"]
    (moved,) = keeper.set_aside_newer(2)
    assert moved.startswith("step_00000003.superseded-")
    assert keeper.latest() == keeper.root / "step_00000002"
    os.truncate(keeper.steps()[0] / "model" / "__0_0.distcp", 10)
    save_trained(tmp_path, 4, keep=1)  # damaged ones are not counted, and left for a human to look at
    assert [p.name for p in keeper.steps()] == ["step_00000002", "step_00000004"]
    with pytest.raises(ValueError, match=r"checkpoint.keep is -1; the nearest legal value is 0"):
        CheckpointStore(tmp_path, keep=-1)


@pytest.mark.parametrize("key", ["keep", "keep_every", "keep_best"])
def test_negative_values_are_refused(key):
    with pytest.raises(ValueError, match=rf"checkpoint.{key} is -1; the nearest legal value is 0"):
        Retention(**{key: -1})


def test_a_kill_between_rename_and_deletion_leaves_a_hidden_name(tmp_path, monkeypatch):
    keeper = _save(tmp_path, 10)
    monkeypatch.setattr("moetrain.checkpoint.store.shutil.rmtree", lambda *_, **__: None)
    keeper.remove(keeper.steps()[0])
    monkeypatch.undo()
    assert keeper.steps() == []
    assert len(keeper.clean()) == 1
    assert not any(keeper.root.iterdir())


def test_a_damaged_loss_neither_counts_nor_stops_the_save(tmp_path):
    for step in (10, 20, 30):
        _save(tmp_path, step)
    damaged = tmp_path / "checkpoints" / "step_00000020" / "trainer.json"
    damaged.write_text(damaged.read_text().replace("3.0", "3.?"))  # of the same size
    assert _kept(_save(tmp_path, 40, keep=1, keep_best=1)) == [20, 40]
