"""Kill a run again and again, at random moments, and see that nothing of it is lost or different.

    python -m moetrain.testing.chaos [--rounds 30] [--seed N] [--dir DIR]

One uninterrupted run of 4 gloo ranks is the reference. Then each round starts the run, which resumes by itself, kills
every process of it with SIGKILL, and looks at what is on disk: each published checkpoint is whole, the newest is no
older than the newest seen before the kill, and every row of metrics and samples is the reference's, to the bit. A run
that reaches its end must have the reference's last checkpoint, byte for byte; the next round then begins another.

A third of the rounds start real torchrun (agent and ranks are killed); in the others ranks are forked from this
process, which has everything imported already. In a third of all rounds the kill must hit a save: an unpublished
directory is there and the run is dead. Background saves and saves in the loop take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moetrain.checkpoint import manifest
from moetrain.checkpoint.store import CheckpointStore
from moetrain.observe.metrics import MEASURED, read_rows
from moetrain.testing.ports import free_port
from moetrain.testing.processes import Launch
from moetrain.testing.small import SMALLEST_MODEL, write_documents

WORLD, STEPS, EVERY = 4, 60, 3
LIMIT_S = 120.0  # without any progress counts as a hang
MODEL = [*SMALLEST_MODEL, "model.moe.n_experts=4", "optim.lr=0.003", "balance=[switch,bias]", "parallel.ep=2"]


class Broken(Exception):
    """What a round found wrong."""


class Chaos:
    """One session of rounds under `root`. `seed` decides every moment but those the machine decides."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        self.data = write_documents(root)
        self.straight, self.run_dir = root / "straight", root / "runs" / "0"
        self.rows: list[dict[str, Any]] = []
        self.events: list[int] = []  # of the run, before this start
        self.starts = 0
        self.runs, self.lost_steps, self.kinds = 0, 0, Counter[str]()

    def reference(self) -> None:
        """The uninterrupted run."""
        self._finish(self._fork(self.straight, "straight"))
        self.rows, self.samples = _rows(self.straight)

    def round(self, number: int, torchrun: bool, in_save: bool) -> bool:
        """Start, kill, look. Returns whether the kill was as asked: not after the end, in a save if that was asked."""
        expected, self.events = self._newest(), _events(self.run_dir)
        start = self._torchrun if torchrun else self._fork
        launch = start(self.run_dir, f"round_{number:03d}")
        try:
            if not self._wait_for_the_moment(launch, expected, in_save):
                self._finish(launch)
                self._whole(expected)
                self._next_run()
                return False
            published = self._newest()
        finally:
            killed = launch.kill()
        if not torchrun and killed < WORLD:
            raise Broken(f"only {killed} of {WORLD} ranks were there to kill")
        hit = bool(list((self.run_dir / "checkpoints").glob(".step_*.tmp-*")))
        self._look(expected, published)
        self.kinds["torchrun" if torchrun else "forked"] += 1
        self.kinds["in a save"] += hit
        return hit or not in_save

    def end(self) -> None:
        """Let the last run go to its end."""
        expected, self.events = self._newest(), _events(self.run_dir)
        self._finish(self._fork(self.run_dir, "end"))
        self._whole(expected)

    def _wait_for_the_moment(self, launch: Launch, expected: int, in_save: bool) -> bool:
        """False if the run ended first."""
        after = self.random.choice([-1, 0, *range(8)])  # steps beyond the resume; -1: at any moment of the start
        if after < 0 and not in_save:
            self._until(launch, lambda: False, self.random.uniform(0, 4))
            return launch.alive()
        if not self._until(launch, lambda: _last_step(self.run_dir) >= expected + after, LIMIT_S):
            return False
        folder = self.run_dir / "checkpoints"
        if in_save and not self._until(launch, lambda: folder.is_dir() and any(folder.glob(".step_*.tmp-*")), LIMIT_S):
            return False
        time.sleep(self.random.uniform(0, 0.03 if in_save else 0.3))
        return launch.alive()

    def _until(self, launch: Launch, seen: Callable[[], bool], seconds: float) -> bool:
        deadline, step = time.monotonic() + seconds, -1
        while not seen():
            if seconds == LIMIT_S and (now := _last_step(self.run_dir if self.rows else self.straight)) != step:
                deadline, step = time.monotonic() + seconds, now
            if not launch.alive():
                if launch.failed():
                    raise Broken("the run failed by itself")
                return False
            if time.monotonic() > deadline:
                if seconds == LIMIT_S:
                    raise Broken(f"no progress in {LIMIT_S:.0f} s: a hang")
                return False
            time.sleep(0.005)
        return True

    def _look(self, expected: int, published: int) -> None:
        """What a killed run left. expected: what this start resumed from; published: the newest before the kill."""
        store = CheckpointStore(self.run_dir)
        for path in store.steps():
            if wrong := manifest.problems(path, None):
                raise Broken(f"a published checkpoint is damaged: {wrong}")
        newest = self._newest()
        if newest < max(expected, published):
            raise Broken(f"step {max(expected, published)} was published and the newest is {newest}")
        if not (self.run_dir / "metrics.jsonl").exists():
            return
        rows, samples = _rows(self.run_dir)
        events = _events(self.run_dir)
        if events != self.events and events[-1:] != [expected]:  # equal: it was killed before it resumed
            raise Broken(f"resumed from {events} and not from {expected}")
        if rows != self.rows[: len(rows)] or len(rows) < newest:
            raise Broken("metrics differ from the uninterrupted run")
        if samples != self.samples[: len(samples)]:
            raise Broken("samples differ from the uninterrupted run")
        self.lost_steps = max(self.lost_steps, len(rows) - newest)

    def _whole(self, expected: int) -> None:
        """What a run that reached its end left."""
        self._look(expected, STEPS)
        if _rows(self.run_dir) != (self.rows, self.samples):
            raise Broken("the finished run differs from the uninterrupted one")
        last = [manifest.read(d / "checkpoints" / manifest.step_name(STEPS)) for d in (self.run_dir, self.straight)]
        if last[0]["files"] != last[1]["files"]:
            raise Broken("the last checkpoint differs from the uninterrupted run's")
        if left := [path.name for path in (self.run_dir / "checkpoints").iterdir() if path.name.startswith(".")]:
            raise Broken(f"leftovers of killed saves were not cleaned up: {left}")
        self.runs += 1

    def _next_run(self) -> None:
        self.run_dir = self.root / "runs" / str(self.runs)

    def _newest(self) -> int:
        steps = CheckpointStore(self.run_dir).steps()
        return int(steps[-1].name.removeprefix("step_")) if steps else 0

    def _finish(self, launch: Launch) -> None:
        try:
            self._until(launch, lambda: not launch.alive(), LIMIT_S)
            if launch.failed():
                raise Broken("the run failed by itself")
        finally:
            launch.kill()

    def _overrides(self, run_dir: Path) -> list[str]:
        self.starts += 1
        return [
            *MODEL, *self.data, f"run.dir={run_dir}", f"train.steps={STEPS}", "train.eval_every=0",
            "train.log_every=1000", "train.micro_batch=1", "run.log_samples=true", "run.hang_timeout_s=60",
            f"checkpoint.every={EVERY}", "checkpoint.keep=2",
            f"checkpoint.asynchronous={self.starts % 2 == 0}",
        ]  # fmt: skip

    def _log(self, name: str) -> Path:
        (self.root / "logs").mkdir(exist_ok=True)
        return self.root / "logs" / f"{name}.log"

    def _torchrun(self, run_dir: Path, name: str) -> Launch:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
        with open(self._log(name), "w") as log:
            agent = subprocess.Popen(
                [*command, "-m", "moetrain", "train", *self._overrides(run_dir)], stdout=log, stderr=log
            )
        return Launch([agent.pid], agent)

    def _fork(self, run_dir: Path, name: str) -> Launch:
        import moetrain.trainer  # noqa: F401  # once, before the fork, for all ranks of all rounds
        from moetrain import cli

        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        log, pids, overrides = self._log(name), [], self._overrides(run_dir)
        for rank in range(WORLD):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    with open(log, "a") as file:
                        os.dup2(file.fileno(), 1)
                        os.dup2(file.fileno(), 2)
                    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
                    os.environ.update(place, **{key: str(value) for key, value in ranks.items()})
                    code = cli.main(["train", *overrides])
                    sys.stdout.flush()
                finally:
                    os._exit(code)
            pids.append(pid)
        return Launch(pids)


def _last_step(run_dir: Path) -> int:
    """Of the rows, from the end of the file alone: this is asked all the time."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            found = re.findall(rb'^\{"step": (\d+),.*\}$', file.read(), re.MULTILINE)
    except FileNotFoundError:
        return 0
    return int(found[-1]) if found else 0


def _events(run_dir: Path) -> list[int]:
    """The steps that the run was resumed from."""
    path = run_dir / "metrics.jsonl"
    return [row["step"] for row in read_rows(path) if "event" in row] if path.exists() else []


def _rows(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Metrics without times, and samples."""
    metrics = [row for row in read_rows(run_dir / "metrics.jsonl") if "event" not in row]
    samples = run_dir / "samples.jsonl"
    plain = [{key: value for key, value in row.items() if key not in MEASURED} for row in metrics]
    return plain, read_rows(samples) if samples.exists() else []


def main(arguments: list[str] | None = None) -> int:
    """Exit 1 if any round found anything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--dir", type=Path, default=None, help="kept; else a temporary one, kept after a failure")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    root = Path(tempfile.mkdtemp(prefix="moetrain-chaos-")) if options.dir is None else options.dir
    root.mkdir(parents=True, exist_ok=True)
    print(f"chaos: seed {seed}, {options.rounds} rounds, {WORLD} ranks, in {root}", flush=True)
    begin, chaos, done, number, wanted = time.monotonic(), Chaos(root, seed), 0, 0, -(-options.rounds // 3)
    try:
        chaos.reference()
        print(f"chaos: the uninterrupted run took {time.monotonic() - begin:.0f} s", flush=True)
        while done < options.rounds or chaos.kinds["in a save"] < wanted or chaos.kinds["torchrun"] < wanted:
            torchrun, in_save = number % 3 == 1, number % 3 == 0 or chaos.kinds["in a save"] < wanted <= done / 2
            number += 1
            if number > 4 * options.rounds:
                raise Broken(f"{number} rounds and only {chaos.kinds} kills")
            done += chaos.round(number, torchrun, in_save)
            print(f"round {number}: {dict(chaos.kinds)}, newest step {chaos._newest()}", flush=True)
        chaos.end()
    except Broken as error:
        print(f"chaos: BROKEN in round {number}, seed {seed}: {error}; logs in {root}", flush=True)
        return 1
    summary = {
        "seed": seed, "rounds": number, "kills": chaos.kinds["torchrun"] + chaos.kinds["forked"],
        **chaos.kinds, "runs finished": chaos.runs, "most steps trained again": chaos.lost_steps,
        "seconds": round(time.monotonic() - begin),
    }  # fmt: skip
    print("chaos: nothing lost, nothing different\n" + json.dumps(summary), flush=True)
    if options.dir is None:
        shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
