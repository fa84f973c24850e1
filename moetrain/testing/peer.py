"""Peer memory in a shared file, for ranks of one machine without GPUs: the same protocol, in turn or in threads."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.peer import FLAG_BYTES, LANES

PATIENCE = 60.0  # seconds


class FileMemory:
    """comm.peer.PeerMemory, one thing after the other: what is left out between lanes and the host is not noticed.

    jitter: most seconds that a copy or a flag is late, at random, to shake the order of ranks.

    ignored: flags whose waits are skipped: a protocol that stays right without them does not need them.
    """

    def __init__(
        self, group: dist.ProcessGroup, nbytes: int, directory: Path, jitter: float = 0.0, ignored: tuple[int, ...] = ()
    ) -> None:
        self.rank, self.size, self.ignored = group.rank(), group.size(), ignored
        total = FLAG_BYTES + nbytes
        if self.rank == 0:
            for rank in range(self.size):
                (directory / f"memory{rank}").write_bytes(bytes(total))
        dist.barrier(group)
        files = [str(directory / f"memory{rank}") for rank in range(self.size)]
        self._memory = [torch.from_file(name, shared=True, size=total, dtype=torch.uint8) for name in files]
        self._random, self._jitter = random.Random(self.rank), jitter

    def view(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        start = FLAG_BYTES + offset
        return self._memory[rank][start : start + size].view(dtype).view(shape)

    def copy(self, to: Tensor, source: Tensor, lane: int | None) -> None:
        to.copy_(source)

    def write(self, to: Tensor, source: Tensor | float, lane: int | None) -> None:
        _ = to.copy_(source) if isinstance(source, Tensor) else to.fill_(source)

    def post(self, rank: int, flag: int, value: int, lane: int | None = None) -> None:
        self._shake()
        self._flags(rank)[flag] = value

    def wait(self, flag: int, value: int, lane: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while flag not in self.ignored and self._flags(self.rank)[flag] < value:
            assert time.monotonic() < deadline, f"flag {flag} of rank {self.rank} did not reach {value}"
            time.sleep(1e-4)
        self._shake()

    def mark(self, lane: int | None = None) -> Any:
        return None

    def after(self, mark: Any, lane: int | None = None) -> None:
        return None

    def _flags(self, rank: int) -> np.ndarray:
        """Not a tensor: tests count what the host reads of tensors."""
        return self._memory[rank][:FLAG_BYTES].numpy().view(np.int32)

    def _shake(self) -> None:
        if self._jitter:
            time.sleep(self._random.random() * self._jitter)


class ThreadedMemory(FileMemory):
    """FileMemory whose lanes are threads; the host's own thread is the current stream. What is copied is late, too."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._queues: list[queue.SimpleQueue[Callable[[], None]]] = [queue.SimpleQueue() for _ in range(LANES)]
        for lane in range(LANES):
            threading.Thread(target=self._work, args=(lane,), daemon=True).start()

    def _work(self, lane: int) -> None:
        with torch.no_grad():  # which is a thread's own
            while True:
                self._queues[lane].get()()

    def _do(self, lane: int | None, what: Callable[..., Any], *args: Any) -> None:
        if lane is None:
            what(*args)
        else:
            self._queues[lane].put(partial(what, *args))

    def copy(self, to: Tensor, source: Tensor, lane: int | None) -> None:
        self._do(lane, self._shake)
        self._do(lane, super().copy, to, source, lane)

    def write(self, to: Tensor, source: Tensor | float, lane: int | None) -> None:
        self._do(lane, self._shake)
        self._do(lane, super().write, to, source, lane)

    def post(self, rank: int, flag: int, value: int, lane: int | None = None) -> None:
        self._do(lane, super().post, rank, flag, value, lane)

    def wait(self, flag: int, value: int, lane: int) -> None:
        self._do(lane, super().wait, flag, value, lane)

    def mark(self, lane: int | None = None) -> Any:
        reached = threading.Event()
        self._do(lane, reached.set)
        return reached

    def after(self, mark: Any, lane: int | None = None) -> None:
        self._do(lane, _meet, mark)


def _meet(mark: threading.Event) -> None:
    assert mark.wait(PATIENCE), "a lane did not get there"
