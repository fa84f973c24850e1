"""Keep a tracker from ever slowing or failing a run."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moetrain.observe.secrets import mask_secrets
from moetrain.observe.trackers.base import Tracker

logger = logging.getLogger("moetrain.observe")

_FINISH = None  # the queue's last entry


class SafeTracker:
    """Runs a tracker in a daemon thread behind a bounded queue; its methods return at once and never raise.

    A full queue drops rows and counts them (`dropped`). The first exception is reported as a warning, the rest are
    silent; after a failed `start` everything is dropped. `finish` waits at most finish_timeout seconds for the
    queue and the tracker's own `finish`, then leaves the thread to die with the process.
    """

    def __init__(self, tracker: Tracker, name: str, capacity: int = 1000, finish_timeout: float = 20.0) -> None:
        self.name = name
        self.dropped = 0
        self._tracker = tracker
        self._finish_timeout = finish_timeout
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(capacity)
        self._reported = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)

    def start(self, run_dir: str | Path, name: str, config: dict[str, Any]) -> None:
        clean = mask_secrets(config)
        self._queue.put_nowait(lambda: self._tracker.start(Path(run_dir), name, clean))
        self._thread.start()

    def log(self, row: dict[str, Any], step: int) -> None:
        copy = dict(row)
        try:
            self._queue.put_nowait(lambda: self._tracker.log(copy, step))
        except queue.Full:
            self.dropped += 1

    def finish(self) -> None:
        if not self._thread.is_alive():
            return
        deadline = time.monotonic() + self._finish_timeout
        try:
            self._queue.put(_FINISH, timeout=self._finish_timeout)
        except queue.Full:
            pass
        else:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("tracker %s did not finish in %g s; leaving it", self.name, self._finish_timeout)
        if self.dropped:
            logger.warning("tracker %s was too slow: %d rows were not sent to it", self.name, self.dropped)

    def _work(self) -> None:
        start = self._queue.get()
        assert start is not _FINISH
        usable = self._attempt(start)
        while (task := self._queue.get()) is not _FINISH:
            if usable:
                self._attempt(task)
        if usable:
            self._attempt(self._tracker.finish)

    def _attempt(self, task: Callable[[], None]) -> bool:
        try:
            task()
        except BaseException as error:  # a tracker may raise anything, SystemExit included
            if not self._reported:
                self._reported = True
                logger.warning("tracker %s failed (%s: %s); the run goes on", self.name, type(error).__name__, error)
            return False
        return True
