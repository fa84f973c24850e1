"""Our rows of scripts/bench_train.sh: train without checkpoints, then trace a few steps.

    torchrun ... -m moetrain.testing.bench_ours OUT STEPS OVERRIDES...

Writes the rows of metrics.jsonl into OUT and rank 0's table of shares beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moetrain.observe.annotate import annotate
from moetrain.profile import measure
from moetrain.train import run_config, running


def main(out: Path, steps: int, overrides: list[str]) -> None:
    """Train `steps` steps; rank 0 writes."""
    own = [f"run.dir={out.parent / 'run'}", "run.resume=never", f"train.steps={steps + 3}"]
    with running(run_config([*overrides, *own])) as trainer:
        rows = [trainer.train_step()[0] for _ in range(steps)]
        annotate(trainer.model)
        measure(trainer, out.parent)
        if trainer.rank0:
            out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
