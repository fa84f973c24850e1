"""Memory of every rank of a group that all of them can read: peers' rows are copied without their doing.

A rank writes into its own memory, posts a flag to a peer, and the peer copies what it wants. Copies between GPUs run
on the copy engines and flags are written and waited for by the GPU's front end, so neither takes a multiprocessor from
the matrix products beside which they run, and the host waits for nothing.
"""

from __future__ import annotations

import ctypes
import socket
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

FLAG_BYTES = 16384  # flags are 32 bits, at the start of the memory


class PeerMemory(Protocol):
    """nbytes of each of `size` ranks. Flags start at 0; a flag's values must only grow."""

    rank: int
    size: int

    def view(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Part of a rank's memory, `offset` bytes behind its flags."""

    def post(self, rank: int, flag: int, value: int) -> None:
        """Set a flag of `rank` once all work of the current stream before is done and visible to peers."""

    def wait(self, flag: int, value: int) -> None:
        """What follows on the current stream waits until this rank's flag is at least `value`."""

    def beside(self) -> AbstractContextManager[Any]:
        """Inside, the current stream is the one for copies from peers."""

    def mark(self) -> Any:
        """A point in the current stream, for `after`."""

    def after(self, mark: Any) -> None:
        """What follows on the current stream waits for that point."""


class SymmetricMemory:
    """PeerMemory of GPUs that reach each other, by torch's symmetric memory. Collective; freed with the object."""

    def __init__(self, group: dist.ProcessGroup, nbytes: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        device = torch.device("cuda", torch.cuda.current_device())
        self.rank, self.size = group.rank(), group.size()
        self._memory = symmetric.empty(FLAG_BYTES + nbytes, dtype=torch.uint8, device=device)
        self._handle = symmetric.rendezvous(self._memory, group.group_name)
        self._memory[:FLAG_BYTES].zero_()
        torch.cuda.synchronize()
        dist.barrier(group, device_ids=[device.index])
        self._driver = _Driver()
        # Priority gives it hardware queues of its own: a wait at the head of a shared one would hold other streams up.
        self._stream = torch.cuda.Stream(device, priority=-1)

    def view(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        start, odd = divmod(FLAG_BYTES + offset, dtype.itemsize)
        assert odd == 0
        return self._handle.get_buffer(rank, shape, dtype, start)

    def post(self, rank: int, flag: int, value: int) -> None:
        self._driver.write(self._address(rank, flag), value)

    def wait(self, flag: int, value: int) -> None:
        self._driver.wait(self._address(self.rank, flag), value)

    def beside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record()
        return event

    def after(self, mark: torch.cuda.Event) -> None:
        mark.wait()

    def _address(self, rank: int, flag: int) -> int:
        assert 0 <= 4 * flag < FLAG_BYTES
        return self._handle.buffer_ptrs[rank] + 4 * flag


class _Driver:
    """Two calls of the CUDA driver that torch does not offer as a pair."""

    AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ, cyclic in 32 bits

    def __init__(self) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        self._write, self._wait = library.cuStreamWriteValue32_v2, library.cuStreamWaitValue32_v2
        for call in (self._write, self._wait):
            call.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
            call.restype = ctypes.c_int

    def write(self, address: int, value: int) -> None:
        self._check(self._write(torch.cuda.current_stream().cuda_stream, address, value & 0xFFFFFFFF, 0))

    def wait(self, address: int, value: int) -> None:
        self._check(self._wait(torch.cuda.current_stream().cuda_stream, address, value & 0xFFFFFFFF, self.AT_LEAST))

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"CUDA driver error {status} on a stream memory operation")


def unreachable(group: dist.ProcessGroup, device_type: str) -> str | None:
    """Why the ranks of `group` cannot read each other's memory, the same on all; None if they can. Collective."""
    if device_type != "cuda":
        return f"needs GPUs, not {device_type}"
    mine = (socket.gethostname(), torch.cuda.current_device())
    places: list[Any] = [None] * group.size()
    dist.all_gather_object(places, mine, group=group)
    found: list[str | None] = [None] * group.size()
    dist.all_gather_object(found, _obstacle(mine, places), group=group)
    return next((reason for reason in found if reason), None)


def _obstacle(mine: tuple[str, int], places: list[tuple[str, int]]) -> str | None:
    hosts = {host for host, _ in places}
    if len(hosts) > 1:
        return f"its ranks are on {len(hosts)} hosts"
    for _, device in places:
        if device != mine[1] and not torch.cuda.can_device_access_peer(mine[1], device):
            return f"GPU {mine[1]} has no peer access to GPU {device}"
    if len(set(places)) < len(places):
        return "two ranks share a GPU"
    return None
