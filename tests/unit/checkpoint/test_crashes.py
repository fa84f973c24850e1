"""What saving again, a full disk, or a kill at any moment leaves behind."""

from __future__ import annotations

import json
import os

import pytest
import torch

from moetrain.checkpoint import manifest
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.use import read_trainer_state
from moetrain.testing.checkpoints import TRAINER_STATE, save_trained, trained

pytestmark = pytest.mark.unit


def test_saving_a_step_again_replaces_it(tmp_path):
    path, _ = save_trained(tmp_path)
    pair = trained(seed=7)
    assert CheckpointStore(tmp_path).save(2, *pair, {"again": True}, {}) == path
    assert read_trainer_state(path) == {"again": True}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def _killed_saving(run, step, monkeypatch, call):
    """Save in a forked child that dies at its call number `call` of rename or fsync, as if by kill -9."""
    child = os.fork()
    if child == 0:
        calls = iter(range(10_000))

        def dying(real):
            return lambda *args, **kwargs: os._exit(9) if next(calls) == call else real(*args, **kwargs)

        monkeypatch.setattr(os, "rename", dying(os.rename))
        monkeypatch.setattr(os, "fsync", dying(os.fsync))
        try:
            CheckpointStore(run, keep=1).save(step, *trained(steps=step), {"step": step}, {})
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("step", [1, 2], ids=["replacing", "new"])
def test_killed_at_any_moment_leaves_an_intact_step(tmp_path, monkeypatch, step):
    if torch.cuda.is_initialized():
        pytest.skip("forks, and CUDA has started in this process")
    call = 0
    while True:
        run = tmp_path / str(call)
        first, _ = save_trained(run, step=1)
        died = _killed_saving(run, step, monkeypatch, call)
        keeper = CheckpointStore(run)
        keeper.clean()
        latest = keeper.latest(deep=True)
        assert latest is not None
        assert read_trainer_state(latest) in (TRAINER_STATE, {"step": step})
        assert all(not p.name.startswith(".") for p in first.parent.iterdir())
        if not died:
            break
        call += 1
    assert call > 8  # it did die at each write, sync, and rename
    assert read_trainer_state(latest) == {"step": step}


def test_a_failed_save_says_so_and_leaves_what_was(tmp_path, monkeypatch):
    path, _ = save_trained(tmp_path, step=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "digest", full)
    with pytest.raises(OSError, match="No space left"):
        CheckpointStore(tmp_path).save(2, *trained(), TRAINER_STATE, {})
    monkeypatch.undo()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert json.loads((path / "trainer.json").read_text()) == TRAINER_STATE
