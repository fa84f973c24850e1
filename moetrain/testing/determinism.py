"""What `run.deterministic=true` costs: the same short run with and without it, in turns.

    python -m moetrain.testing.determinism [--steps 60] [--rounds 3] [overrides ...]

Prints each mode's tokens per second (the median step of the median round, the first five steps left out), and whether
two runs of a mode were the same to the bit.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

WARM_UP = 5


def measure(mode: str, run_dir: Path, steps: int, overrides: list[str]) -> tuple[float, list[float]]:
    """Median tokens per second of one run, and the loss of each step."""
    options = ["experiment=quickstart", "train.eval_every=0", f"train.steps={steps}", *overrides]
    options += [f"run.deterministic={mode}", f"run.dir={run_dir}"]
    subprocess.run([sys.executable, "-m", "moetrain", "train", *options], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_s"] for row in rows if row["step"] > WARM_UP]
    return median(speeds), [row["loss"] for row in rows]


def main(argv: list[str] | None = None) -> int:
    """Print both modes; exit 1 if two deterministic runs differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(argv)
    runs: dict[str, list[tuple[float, list[float]]]] = {"false": [], "true": []}
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.rounds):
            for mode, done in runs.items():
                done.append(measure(mode, Path(name) / f"{mode}-{number}", options.steps, options.overrides))
    speed = {mode: median(speed for speed, _ in done) for mode, done in runs.items()}
    same = {mode: all(losses == done[0][1] for _, losses in done) for mode, done in runs.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    print(f"{device}, torch {torch.__version__}, {options.rounds} rounds of {options.steps} steps each")
    for mode in runs:
        equal = "equal to the bit" if same[mode] else "DIFFERENT"
        print(f"run.deterministic={mode:<5}  {speed[mode]:,.0f} tokens/s  runs {equal}")
    print(f"cost: {100 * (1 - speed['true'] / speed['false']):.1f}% of throughput")
    return 0 if same["true"] else 1


if __name__ == "__main__":
    sys.exit(main())
