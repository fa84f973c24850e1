"""From the `tracker` group of the configuration to running trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from moetrain.observe.trackers.safe import SafeTracker


class Trackers:
    """Every tracker of a run as one; without any (`tracker=none`, ranks other than 0) it does nothing."""

    def __init__(self, trackers: Sequence[SafeTracker] = ()) -> None:
        self._trackers = tuple(trackers)

    def start(self, run_dir: str | Path, name: str, config: dict[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.start(run_dir, name, config)

    def log(self, row: dict[str, Any], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(row, step)

    def finish(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def build_trackers(config: Mapping[str, Mapping[str, Any]]) -> Trackers:
    """Construct what `tracker=[...]` chose, each behind a `SafeTracker`.

    config: name -> constructor arguments with `_target_`. Raises ValueError naming the tracker whose `_target_` or
    arguments are wrong: that is a mistake in the configuration, and is found before any step.
    """
    trackers = []
    for name, options in config.items():
        try:
            trackers.append(SafeTracker(instantiate(dict(options)), name))
        except (InstantiationException, TypeError, ValueError) as error:
            raise ValueError(f"tracker.{name} cannot be built: {error.__cause__ or error}") from error
    return Trackers(trackers)
