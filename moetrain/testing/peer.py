"""Peer memory in a shared file, for ranks of one machine without GPUs: the same protocol, one thing after the other."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.peer import FLAG_BYTES


class FileMemory:
    """comm.peer.PeerMemory. jitter: most seconds that a copy or a flag is late, at random, to shake the order of ranks.

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
        deadline = time.monotonic() + 60
        while flag not in self.ignored and self._flags(self.rank)[flag] < value:
            assert time.monotonic() < deadline, f"flag {flag} of rank {self.rank} did not reach {value}"
            time.sleep(1e-4)
        self._shake()

    def mark(self, lane: int | None = None) -> None:
        return None

    def after(self, mark: None, lane: int | None = None) -> None:
        return None

    def _flags(self, rank: int) -> np.ndarray:
        """Not a tensor: tests count what the host reads of tensors."""
        return self._memory[rank][:FLAG_BYTES].numpy().view(np.int32)

    def _shake(self) -> None:
        if self._jitter:
            time.sleep(self._random.random() * self._jitter)
