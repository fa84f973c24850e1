"""`run.resume=auto` beside damaged checkpoints, on ranks: passed over, said aloud, and nothing lost but their steps."""

from __future__ import annotations

import json
import os

import pytest
import torch

from moetrain.checkpoint.use import read_trainer_state
from moetrain.moe.balance.bias import SelectionBias
from moetrain.observe.metrics import MEASURED
from moetrain.testing import RankFailure, run_ranks
from moetrain.testing.small import SMALLEST_MODEL
from moetrain.testing.trajectory import new_trainer, whole

pytestmark = pytest.mark.distributed
TINY = [
    "experiment=quickstart",
    *SMALLEST_MODEL,
    "train.eval_every=0",
    "balance=[switch,bias]",
    "checkpoint.every=1",
    "checkpoint.keep=0",
]


def _train(run_dir, *overrides):
    """One run on this rank: its first step, the random numbers that a plugin drew each step, and the weights."""
    drawn, plain = {}, SelectionBias.before_step

    def before_step(plugin, count_E):
        drawn.setdefault(trainer.step, []).append(torch.rand(2).tolist())
        plain(plugin, count_E)

    SelectionBias.before_step = before_step  # a forked rank's own
    trainer = new_trainer([*TINY, f"run.dir={run_dir}", *overrides])
    first = trainer.step
    trainer.fit()
    weights = {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}
    trainer.close()
    return first, drawn, weights


def _rows(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [{k: v for k, v in row.items() if k not in MEASURED} for row in lines if "event" not in row]
    return steps, [row for row in lines if "event" in row]


def _flip(path):
    file = next(path.glob("optim/__1_*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _pipe(path):
    (path / "trainer.json").unlink()
    os.mkfifo(path / "trainer.json")


def test_damaged_steps_are_passed_over_aloud_and_the_run_ends_as_if_nothing_had_happened(tmp_path, capfd):
    ranks = ["parallel.ep=2", "train.steps=5"]
    straight = run_ranks(_train, 2, tmp_path / "straight", *ranks)
    run = tmp_path / "broken"
    run_ranks(_train, 2, run, "parallel.ep=2", "train.steps=5", "checkpoint.every=1")
    folder = run / "checkpoints"
    _flip(folder / "step_00000005")
    _pipe(folder / "step_00000004")
    capfd.readouterr()
    resumed = run_ranks(_train, 2, run, *ranks, timeout_s=60)
    said = capfd.readouterr().out
    for rank in (0, 1):
        first, drawn, weights = resumed[rank]
        assert first == 3
        assert drawn == {step: straight[rank][1][step] for step in (3, 4)}  # random numbers go on as well
        assert all(torch.equal(weights[name], value) for name, value in straight[rank][2].items())
    assert straight[0][1] != straight[1][1]
    steps, events = _rows(run)
    assert steps == _rows(tmp_path / "straight")[0]
    assert [event["event"] for event in events] == ["resume", "skipped_checkpoint", "skipped_checkpoint"]
    assert [event.get("checkpoint") for event in events[1:]] == ["step_00000005", "step_00000004"]
    assert {event["step"] for event in events} == {3}
    assert "optim/__1_0.distcp is damaged" in events[1]["problems"][0]
    assert "step_00000005 is damaged and not used" in said
    assert "trainer.json is neither a file nor a folder" in said
    aside = sorted(path.name.split("-")[0] for path in folder.glob("*superseded*"))
    assert aside == ["step_00000004.superseded", "step_00000005.superseded"]  # kept, out of the way


def test_no_intact_step_is_refused_on_every_rank(tmp_path):
    ranks = ["parallel.ep=2", "train.steps=1"]
    run_ranks(_train, 2, tmp_path, *ranks)
    _flip(tmp_path / "checkpoints" / "step_00000001")

    def refused():
        with pytest.raises(ValueError, match=r"no intact step; run\.resume=never"):
            _train(tmp_path, *ranks)
        return True

    assert run_ranks(refused, 2, timeout_s=60) == [True, True]
    first, _, _ = run_ranks(_train, 2, tmp_path, *ranks, "run.resume=never")[0]
    assert first == 0


def test_the_best_stays_and_names_may_be_excepted(tmp_path, capfd):
    # Such a learning rate makes it worse with every step, which a run is otherwise stopped for.
    kept = ["train.eval_every=1", "train.eval_batches=1", "checkpoint.keep=1", "checkpoint.keep_best=1"]
    run = tmp_path / "run"
    run_ranks(_train, 1, run, *kept, "train.steps=4", "balance=[switch]", "optim.lr=30", "train.max_loss=0")
    losses = {row["step"]: row["val_loss"] for row in _rows(run)[0] if row["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best < 4
    steps = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in steps] == [f"step_{step:08d}" for step in sorted({best, 4})]
    assert {read_trainer_state(path)["val_loss"] for path in steps} == {losses[best], losses[4]}

    start = ["train.steps=1", f"init.from={run}", "train.max_loss=0"]
    with pytest.raises(RankFailure, match=r"missing in the checkpoint: layers.0.moe.balance.bias.bias_E"):
        run_ranks(_train, 1, tmp_path / "other", *start)
    capfd.readouterr()
    run_ranks(_train, 1, tmp_path / "other", *start, "init.allow=['*.bias_E']")
    assert "init.allow excepts layers.0.moe.balance.bias.bias_E, layers.1" in capfd.readouterr().out
