"""A run that is killed and resumed has the metrics, samples, and weights of one that was not, to the bit."""

import json
import os
import random

import pytest
import torch

from moetrain.observe.metrics import MEASURED
from moetrain.testing import RankFailure, run_ranks
from moetrain.testing.small import SMALLEST_MODEL
from moetrain.testing.trajectory import new_trainer, whole

pytestmark = pytest.mark.distributed
STEPS, EVERY = 60, 7
OVERRIDES = [
    "experiment=quickstart",
    *SMALLEST_MODEL,
    "train.micro_batch=1",
    f"train.steps={STEPS}",
    "train.eval_every=15",
    "train.eval_batches=1",
    "train.log_every=1000",
    "parallel.ep=2",
    "balance=[switch,z_loss,bias]",
    "balance.switch.scope=global_batch",
    "run.log_samples=true",
    f"checkpoint.every={EVERY}",
]


def train(run_dir, die_after=None):
    """One run on this rank; `die_after` kills the process before that step's row is complete on disk."""
    trainer = new_trainer([*OVERRIDES, f"run.dir={run_dir}"])
    started_at = trainer.step
    if die_after is not None:
        step = trainer.train_step

        def mortal(stop=False):
            if trainer.step == die_after:
                os._exit(9)
            return step(stop)

        trainer.train_step = mortal
    trainer.fit()
    weights = {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}
    trainer.close()
    return started_at, weights


def rows(run_dir, name="metrics.jsonl"):
    lines = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in lines if "event" not in row]


def test_killed_and_resumed_equals_uninterrupted_to_the_bit(tmp_path):
    die_after = random.Random(os.environ.get("MOETRAIN_TEST_SEED", "7")).randrange(EVERY + 1, STEPS - 1)
    (_, straight), _ = run_ranks(train, 2, tmp_path / "straight")
    with pytest.raises(RankFailure, match="died"):
        run_ranks(train, 2, tmp_path / "broken", die_after)
    (started_at, resumed), _ = run_ranks(train, 2, tmp_path / "broken")
    assert started_at == die_after // EVERY * EVERY
    assert rows(tmp_path / "broken") == rows(tmp_path / "straight")
    assert [row["step"] for row in rows(tmp_path / "broken")] == list(range(STEPS + 1))
    assert rows(tmp_path / "broken", "samples.jsonl") == rows(tmp_path / "straight", "samples.jsonl")
    events = [json.loads(x) for x in (tmp_path / "broken/metrics.jsonl").read_text().splitlines() if '"event"' in x]
    assert events == [{"event": "resume", "step": started_at}]
    for name, weight in straight.items():
        assert torch.equal(weight, resumed[name]), name


def test_samples_of_the_ranks_are_disjoint_and_their_union_is_the_single_process(tmp_path):
    short = ["train.steps=3", "train.eval_every=3", "train.precision=fp64", "balance.switch.scope=sequence"]

    def run(world, directory):
        trainer = new_trainer([*OVERRIDES, *short, f"run.dir={directory}", f"parallel.ep={world}"])
        trainer.fit()
        trainer.close()

    by_world = {}
    for world in (1, 2, 4):
        run_ranks(run, world, world, tmp_path / str(world))
        by_world[world] = rows(tmp_path / str(world), "samples.jsonl")
    val_loss = {w: [row["val_loss"] for row in rows(tmp_path / str(w)) if "val_loss" in row] for w in (1, 2, 4)}
    for world in (2, 4):
        assert val_loss[world] == pytest.approx(val_loss[1], rel=1e-9)  # before and after training
        for step in (1, 2, 3):
            single = [s for row in by_world[1] if row["step"] == step for s in row["ids"]]
            shares = [row["ids"] for row in by_world[world] if row["step"] == step]
            assert len(shares) == world
            assert sorted(s for share in shares for s in share) == sorted(single)
            assert len({s for share in shares for s in share}) == len(single) == 4
