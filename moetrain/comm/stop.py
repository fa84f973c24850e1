"""A polite stop: the signal handler only remembers, the step loop lets all ranks agree and then ends the run."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Catches SIGTERM and SIGINT while active. A second SIGINT interrupts at once, as usual."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
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
        self.signal = signal.Signals(number).name
