"""Real processes, real signals: what a run does when a part of it dies, hangs, or is asked to go."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moetrain.testing.small import SMALLEST_MODEL

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
SMALL = [
    "experiment=quickstart",
    *SMALLEST_MODEL,
    "train.eval_every=0",
    "parallel.ep=2",
]
# `moetrain train` whose rank 1 meets a fault when it begins step AT, once in the life of the run.
FAULTY = """
import os, pathlib, signal, sys, time
from moetrain import trainer
from moetrain.cli import main

plain, once = trainer.Trainer.train_step, pathlib.Path(os.environ["ONCE"])

def train_step(self, stop=False):
    if self.step + 1 == int(os.environ["AT"]) and os.environ["RANK"] == "1" and not once.exists():
        once.touch()
        if os.environ["FAULT"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    return plain(self, stop)

trainer.Trainer.train_step = train_step
sys.exit(main(sys.argv[1:]))
"""


def environment(**more):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}


def torchrun(*arguments, options=()):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    return [*start, *arguments]


def rows(run_dir):
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def faulty(tmp_path, fault, at, *overrides, options=()):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    variables = environment(FAULT=fault, AT=str(at), ONCE=str(tmp_path / "once"))
    command = torchrun(str(script), "train", *SMALL, f"run.dir={tmp_path / 'run'}", *overrides, options=options)
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=400, check=False)


def test_a_rank_that_dies_is_restarted_with_the_others_and_the_run_ends_well(tmp_path):
    done = faulty(tmp_path, "die", 8, "train.steps=10", "checkpoint.every=3", options=["--max-restarts=1"])
    assert done.returncode == 0, done.stderr
    logged = rows(tmp_path / "run")
    assert [row["step"] for row in logged if "event" not in row] == list(range(1, 11))
    assert [row for row in logged if "event" in row] == [{"event": "resume", "step": 6}]
    assert (tmp_path / "run" / "checkpoints" / "step_00000010").is_dir()


def test_a_hang_is_reported_by_every_rank_and_ends_with_1(tmp_path):
    done = faulty(tmp_path, "hang", 4, "train.steps=9", "run.hang_timeout_s=12")
    assert done.returncode == 1
    (folder,) = (tmp_path / "run" / "hangs").iterdir()
    summary = (folder / "summary.txt").read_text()
    assert "ranks 0: waits in all_reduce, called by" in summary or "ranks 0: waits in all_to_all" in summary
    assert "ranks 1: is in no collective but in train_step (" in summary
    assert summary.splitlines()[0] in done.stderr
    for rank in (0, 1):
        text = (folder / f"rank_{rank:05d}.txt").read_text()
        assert text.splitlines()[0] in done.stderr
        assert f"rank {rank} of 2" in text
        assert "step 4: " in text
        assert "thread MainThread" in text
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_second_run_is_refused_and_ranks_end_with_their_launcher(tmp_path):
    run_dir = tmp_path / "run"
    overrides = [*SMALL, "train.steps=100000", "checkpoint.every=2", f"run.dir={run_dir}"]
    agent = subprocess.Popen(torchrun("-m", "moetrain", "train", *overrides), env=environment())
    try:
        until(lambda: len(rows(run_dir)) >= 5 or agent.poll() is not None)
        workers = psutil.Process(agent.pid).children(recursive=True)
        assert len(workers) == 2
        alone = [sys.executable, "-m", "moetrain", "train", *overrides, "parallel.ep=1"]
        second = subprocess.run(alone, env=environment(), capture_output=True, text=True, timeout=240, check=False)
        assert second.returncode == 2
        holder = json.loads((run_dir / "run.lock").read_text())
        assert holder["pid"] in [worker.pid for worker in workers]
        assert f"in use by pid {holder['pid']} on host {holder['host']}" in second.stderr
        assert len(rows(run_dir)) >= 5
    finally:
        agent.kill()
        agent.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    size = (run_dir / "metrics.jsonl").stat().st_size
    time.sleep(0.5)
    assert (run_dir / "metrics.jsonl").stat().st_size == size
    newest = max(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    steps = int(newest.removeprefix("step_")) + 1
    again = subprocess.run([*alone, f"train.steps={steps}"], env=environment(), timeout=240, check=False)
    assert again.returncode == 0
    assert [row["step"] for row in rows(run_dir) if "event" not in row] == list(range(1, steps + 1))


def test_sigusr1_to_the_launcher_saves_and_ends(tmp_path):
    """What Slurm's --signal=USR1 does, through launch/torchrun.sh, with the save in the background."""
    run_dir = tmp_path / "run"
    overrides = [*SMALL, "train.steps=100000", f"run.dir={run_dir}", "checkpoint.asynchronous=true"]
    variables = environment(PYTHON=sys.executable, NPROC="2", MAX_RESTARTS="0", RDZV_ENDPOINT="localhost:0")
    with open(tmp_path / "log", "w") as log:
        agent = subprocess.Popen(
            [str(ROOT / "launch/torchrun.sh"), *overrides], env=variables, cwd=ROOT, stdout=log, stderr=log
        )
    until(lambda: len(rows(run_dir)) >= 3 or agent.poll() is not None)
    agent.send_signal(signal.SIGUSR1)
    agent.wait(timeout=240)
    last = rows(run_dir)[-1]["step"]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{last:08d}"]
    assert "SIGUSR1" in (tmp_path / "log").read_text()
