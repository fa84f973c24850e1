"""A polite stop: the signal handler only remembers, the step loop lets all ranks agree and then ends the run.

SIGUSR1 as well as SIGTERM: Slurm's `--signal` is often set to it, and a launcher passes on what it got.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


class StopRequest:
    """Catches SIGTERM, SIGUSR1, SIGHUP, and SIGINT while active. A second SIGINT interrupts at once, as usual.

    on_first: called with the first signal's name, in the handler.
    """

    def __init__(self, on_first: Callable[[str], None] | None = None) -> None:
        self.signal: str | None = None
        self._on_first = on_first
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return self.signal is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = signal.Signals(number).name
            if self._on_first:
                self._on_first(self.signal)
