"""How much host memory a piece of code takes at its peak."""

from __future__ import annotations

import ctypes
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

PERIOD_S = 0.002


class PeakMemory:
    """`with PeakMemory() as peak: ...` then `peak.bytes`: the most anonymous memory above what there was before.

    Anonymous memory is what this process allocated; pages of mapped files (safetensors), which the system can drop at
    any time, are left out. A thread looks every 2 ms, or less often on a busy machine, so shorter peaks may be missed;
    `look` looks at once. Linux with glibc only.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        # What was freed but not given back would be taken again without growing the process: a forked rank has plenty.
        ctypes.CDLL(None).malloc_trim(0)
        self._before = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self.look()

    def look(self) -> None:
        """Take note of what is held now."""
        self.bytes = max(self.bytes, anonymous_bytes() - self._before)


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no RssAnon: not Linux?")


def in_a_fresh_process(fn: Callable[..., int], *args: Any) -> int:
    """`fn(*args)`, importable, where nothing ran before: what other tests have freed and left lying in the heap decides
    how much a process grows. Large blocks go back to the system when they are freed, however many were before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_give_back) as pool:
        return pool.submit(fn, *args).result()


def _give_back() -> None:
    m_mmap_threshold = -3  # malloc.h
    assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 128 * 1024)
