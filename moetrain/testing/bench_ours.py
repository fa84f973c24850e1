"""Our rows of scripts/bench_train.sh: train without checkpoints, then trace a few steps.

    torchrun ... -m moetrain.testing.bench_ours OUT STEPS OVERRIDES...

Writes the rows of metrics.jsonl into OUT and rank 0's table of shares beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from moetrain.comm.env import world_size
from moetrain.comm.start import start_distributed, stop_distributed
from moetrain.config.compose import load_config
from moetrain.config.validate import validate
from moetrain.observe.annotate import annotate
from moetrain.profile import measure
from moetrain.train import rehearse
from moetrain.trainer import Trainer


def main(out: Path, steps: int, overrides: list[str]) -> None:
    """Train `steps` steps; rank 0 writes."""
    config = load_config([*overrides, f"run.dir={out.parent / 'run'}", "run.resume=never", f"train.steps={steps + 3}"])
    layout = validate(config, world_size())
    rehearse(config)
    device = start_distributed()
    try:
        trainer = Trainer(config, layout, device)
        rows = [trainer.train_step()[0] for _ in range(steps)]
        annotate(trainer.model)
        measure(trainer, out.parent)
        if dist.get_rank() == 0:
            out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        trainer.close()
    finally:
        stop_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
