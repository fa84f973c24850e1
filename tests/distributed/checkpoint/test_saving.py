"""Ranks: checkpoints written beside the run are those written in it, to the byte, and a full disk ends no run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess

import pytest

from moetrain.checkpoint import manifest
from moetrain.checkpoint.saver import Saver
from moetrain.testing import run_ranks
from moetrain.testing.small import SMALLEST_MODEL
from moetrain.testing.trajectory import new_trainer

pytestmark = pytest.mark.distributed
TINY = [
    "experiment=quickstart",
    *SMALLEST_MODEL,
    "model.attention.n_kv_heads=2",
    "train.micro_batch=1",
    "train.eval_every=0",
    "balance=[switch,z_loss,bias]",
]


def train(overrides):
    """One run on this rank; returns its notes."""
    trainer = new_trainer([*TINY, *overrides])
    notes = []
    trainer.log.note = notes.append
    try:
        trainer.fit()
    finally:
        trainer.close()
    return notes


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_background_saves_equal_those_in_the_loop_to_the_byte(tmp_path):
    common = ["parallel.ep=2", "parallel.tp=2", "train.steps=8", "checkpoint.every=2", "checkpoint.keep=0"]
    for name in ("now", "later"):
        mode = [f"checkpoint.asynchronous={name == 'later'}", f"run.dir={tmp_path / name}"]
        run_ranks(train, 4, [*common, *mode])
    for step in (2, 4, 6, 8):
        now, later = (tmp_path / name / "checkpoints" / f"step_{step:08d}" for name in ("now", "later"))
        assert manifest.problems(later, None) == []
        assert manifest.read(now)["files"] == manifest.read(later)["files"]
    assert not list((tmp_path / "later" / "checkpoints").glob(".*"))
    exposed = [row.get("checkpoint_time_s") for row in rows(tmp_path / "later")]
    assert [seconds is not None for seconds in exposed] == [False, False, True, False, True, False, True, False]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 3 MB, with the permission to mount one; else None."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, check=False)
    if done.returncode:
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def _limited(overrides, limit):
    """Files that grow past `limit` bytes fail on rank 1, which stands in for a quota where nothing can be mounted."""
    plain = Saver.prepare

    def prepare(*args):
        plain(*args)  # the memory that snapshots go to is a file of no disk
        if int(os.environ["RANK"]) == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    Saver.prepare = prepare  # a forked rank's own
    with pytest.raises(Exception, match="the run ends at step 12 and its last checkpoint is of -1"):
        train(overrides)  # on every rank: the first that failed would end the others before they have cleaned up


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_stops_the_save_and_not_the_run(tmp_path, small_disk, asynchronous):
    """Once the ballast is gone the next save succeeds."""
    world, run_dir = 2, tmp_path / "run"
    overrides = ["parallel.ep=2", "train.steps=12", "checkpoint.every=3", "checkpoint.keep=2", f"run.dir={run_dir}"]
    overrides.append(f"checkpoint.asynchronous={asynchronous}")
    if small_disk is None:
        run_ranks(_limited, world, overrides, 10_000)
    else:
        run_dir.mkdir()
        (run_dir / "checkpoints").symlink_to(small_disk, target_is_directory=True)
        (small_disk / "ballast").write_bytes(bytes(3_000_000))

        def run():
            trainer = new_trainer([*TINY, *overrides])
            notes, step = [], trainer.train_step

            def freed(stop=False):
                trainer.saver.wait()
                if trainer.step == 8 and trainer.rank0:
                    (small_disk / "ballast").unlink()
                return step(stop)

            trainer.train_step, trainer.log.note = freed, notes.append
            trainer.fit()
            trainer.close()
            return notes

        notes = run_ranks(run, world)[0]
        assert [note for note in notes if "NOT saved" in note and "No space left" in note], notes
        assert sorted(path.name for path in small_disk.iterdir()) == ["step_00000009", "step_00000012"]
        assert manifest.problems(small_disk / "step_00000009", None) == []
    assert [row["step"] for row in rows(run_dir)] == list(range(1, 13))
    assert not list((run_dir / "checkpoints").glob(".*"))
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
