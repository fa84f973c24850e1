"""One process: a snapshot is of its moment, a failed write is told, a busy writer is waited for or passed over."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from moetrain.checkpoint import manifest
from moetrain.checkpoint.saver import Saver
from moetrain.checkpoint.snapshot import Snapshot
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.tensors import read_metadata
from moetrain.config.schema import CheckpointConfig
from moetrain.optim import adamw

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.wide = nn.Parameter(torch.randn(7, dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("bias_E", torch.randn(4, dtype=torch.float64))


def _trained(seed):
    torch.manual_seed(seed)
    model = _Model()
    optimizer = adamw.build(model.named_parameters(), lr=0.1)
    _update(model, optimizer)
    return model, optimizer


def _update(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    model.bias_E += 1


class _Gated(CheckpointStore):
    """Writes only once it is let."""

    def __init__(self, run_dir):
        super().__init__(run_dir)
        self.gate = threading.Event()

    def save_snapshot(self, *args):
        assert self.gate.wait(30)
        return super().save_snapshot(*args)


def _same(path, other, but_indices=False):
    """Size and SHA-256 of every file. An index is a pickle, whose bytes depend on where its strings came from."""
    files, others = (
        {name: entry for name, entry in manifest.read(p)["files"].items() if not but_indices or ".metadata" not in name}
        for p in (path, other)
    )
    index, other_index = ([vars(read_metadata(p / part)) for part in ("model", "optim")] for p in (path, other))
    return files == others and index == other_index


@pytest.mark.parametrize("apart", [False, True])
def test_what_changes_after_save_returns_is_not_in_the_checkpoint(tmp_path, apart):
    model, optimizer = _trained(0)
    state = {"step": 1, "cursor": {"sample": 3}}
    expected = CheckpointStore(tmp_path / "now").save(1, model, optimizer, state, {}, {})
    store = _Gated(tmp_path / "later")
    saver = Saver(store, CheckpointConfig(asynchronous=True), CPU)
    saver._snapshot = Snapshot(CPU, apart)  # by a process of its own, as on a GPU, or by the thread
    saver.save(1, model, optimizer, state, {}, {})
    saver.before_update()
    _update(model, optimizer)
    state["cursor"]["sample"] = 99
    assert saver.finished() == []
    store.gate.set()
    assert saver.wait() == 1
    (outcome,) = saver.finished()
    assert _same(outcome.path, expected, but_indices=apart)
    second = CheckpointStore(tmp_path / "now").save(2, model, optimizer, state, {}, {})
    saver.save(2, model, optimizer, state, {}, {})  # the memory is used again
    assert saver.wait() == 2
    (outcome,) = saver.finished()
    assert _same(outcome.path, second, but_indices=apart)
    assert not _same(outcome.path, expected)
    assert saver.exposed_s() > 0
    assert saver.exposed_s() == 0
    saver.close()


@pytest.mark.parametrize("policy", ["wait", "skip"])
def test_a_busy_writer_is_waited_for_or_passed_over(tmp_path, policy):
    model, optimizer = _trained(0)
    store = _Gated(tmp_path)
    saver = Saver(store, CheckpointConfig(asynchronous=True, when_busy=policy), CPU)
    saver.save(1, model, optimizer, {"step": 1}, {}, {})
    if policy == "wait":
        threading.Timer(0.3, store.gate.set).start()
    saver.save(2, model, optimizer, {"step": 2}, {}, {})
    store.gate.set()
    newest = saver.wait()
    texts = [str(outcome) for outcome in saver.finished()]
    if policy == "wait":
        assert newest == 2
        assert [path.name for path in store.steps()] == ["step_00000001", "step_00000002"]
    else:
        assert newest == 1
        assert any("step 2 was NOT saved" in text and "when_busy=skip" in text for text in texts)
    saver.save(3, model, optimizer, {"step": 3}, {}, {})
    assert saver.wait() == 3


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_write_is_told_and_the_next_one_is_tried(tmp_path, asynchronous):
    model, optimizer = _trained(0)
    saver = Saver(CheckpointStore(tmp_path), CheckpointConfig(asynchronous=asynchronous), CPU)
    (tmp_path / "checkpoints").write_text("in the way")
    saver.save(1, model, optimizer, {"step": 1}, {}, {})
    assert saver.wait() == -1
    (outcome,) = saver.finished()
    assert outcome.path is None
    assert "step 1 was NOT saved" in str(outcome)
    assert "Error" in str(outcome)
    (tmp_path / "checkpoints").unlink()
    saver.save(2, model, optimizer, {"step": 2}, {}, {})
    assert saver.wait() == 2
    assert saver.finished()[0].path.name == "step_00000002"


def test_a_writer_that_was_killed_is_told_and_replaced(tmp_path):
    model, optimizer = _trained(0)
    saver = Saver(CheckpointStore(tmp_path), CheckpointConfig(asynchronous=True), CPU)
    saver._snapshot = Snapshot(CPU, apart=True)
    saver.save(1, model, optimizer, {"step": 1}, {}, {})
    assert saver.wait() == 1
    saver._snapshot._writer._process.kill()
    saver._snapshot._writer._process.wait()
    process = saver._snapshot._writer._process
    saver._snapshot._writer.alive = lambda: True  # it dies after we looked
    saver.save(2, model, optimizer, {"step": 2}, {}, {})
    assert saver.wait() == 1
    assert "the process that writes checkpoints has ended (-9)" in [str(o) for o in saver.finished()][1]
    del saver._snapshot._writer.alive
    saver.save(3, model, optimizer, {"step": 3}, {}, {})
    assert saver.wait() == 3
    assert saver._snapshot._writer._process is not process
    saver.close()


def test_state_that_json_would_change_is_refused_at_once_without_a_thread(tmp_path):
    model, optimizer = _trained(0)
    with pytest.raises(ValueError, match="JSON"):
        Saver(CheckpointStore(tmp_path), CheckpointConfig(), CPU).save(1, model, optimizer, {1: 2}, {}, {})
