"""TensorBoard event files under the run directory: `tensorboard --logdir RUN/tensorboard`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class TensorBoardTracker:
    """subdir: where the event files go, inside the run directory."""

    def __init__(self, subdir: str = "tensorboard", flush_secs: int = 30) -> None:
        self._subdir = subdir
        self._flush_secs = flush_secs
        self._writer: Any = None

    def start(self, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        import torch.utils.tensorboard  # noqa: F401  # fails here, by name, when tensorboard is not installed

        self._dir = run_dir / self._subdir
        self._title = f"# {name}\n```json\n{json.dumps(config, indent=2, default=str)}\n```"

    def log(self, row: dict[str, Any], step: int) -> None:
        if self._writer is None:
            self._open(step)
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(key, value, step)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that an interrupted run logged past its checkpoint are hidden once they are taken again.
        self._writer = SummaryWriter(str(self._dir), flush_secs=self._flush_secs, purge_step=step)
        self._writer.add_text("config", self._title, step)
