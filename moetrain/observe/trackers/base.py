"""What a tracker is. A new one is a class with these three methods and a YAML in configs/tracker/ naming it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Sends a run's metrics somewhere else. Called from one thread of rank 0, in this order, and may raise or hang."""

    def start(self, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        """Open the run. config is resolved and holds no secrets."""

    def log(self, row: dict[str, Any], step: int) -> None:
        """One row of metrics.jsonl."""

    def finish(self) -> None:
        """Close the run; not called when `start` failed."""
