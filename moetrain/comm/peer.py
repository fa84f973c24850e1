"""Memory of every rank of a group that all of them can read: peers' rows are copied without their doing.

A rank writes into its own memory, posts a flag to a peer, and the peer copies what it wants. Copies between GPUs run
on the copy engines and flags are written and waited for by the GPU's front end, so neither takes a multiprocessor from
the matrix products beside which they run, and the host waits for nothing.
"""

from __future__ import annotations

import ctypes
import socket
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

FLAG_BYTES = 16384  # flags are 32 bits, at the start of the memory
LANES = 2


class PeerMemory(Protocol):
    """nbytes of each of `size` ranks. Flags start at 0; a flag's values must only grow.

    Work goes to the current stream (lane None) or, beside it, to one of LANES streams for copies.
    """

    rank: int
    size: int

    def view(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Part of a rank's memory, `offset` bytes behind its flags."""

    def copy(self, to: Tensor, source: Tensor, lane: int | None) -> None:
        """source, here or in a peer's memory, into `to`. Both contiguous, of the same shape and dtype."""

    def write(self, to: Tensor, source: Tensor | float, lane: int | None) -> None:
        """A number or a tensor here, of any dtype and layout, into `to` of this rank, by a kernel."""

    def post(self, rank: int, flag: int, value: int, lane: int | None = None) -> None:
        """Set a flag of `rank` once all work before is done and visible to peers."""

    def wait(self, flag: int, value: int, lane: int) -> None:
        """What follows waits until this rank's flag is at least `value`."""

    def mark(self, lane: int | None = None) -> Any:
        """A point in the work, for one `after`."""

    def after(self, mark: Any, lane: int | None = None) -> None:
        """What follows waits for that point."""


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
        # A priority that nobody else has (FSDP's streams have -1) gives each hardware queues of its own: a wait at the
        # head of a shared one would hold up what a peer may be waiting for.
        self._streams = [torch.cuda.Stream(device, priority=-2 - lane) for lane in range(LANES)]
        self._raw = [stream.cuda_stream for stream in self._streams]
        self._events: list[torch.cuda.Event] = []  # unused ones: making them costs the host more than recording
        self._addresses = list(self._handle.buffer_ptrs)

    def view(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        start, odd = divmod(FLAG_BYTES + offset, dtype.itemsize)
        assert odd == 0
        return self._handle.get_buffer(rank, shape, dtype, start)

    def copy(self, to: Tensor, source: Tensor, lane: int | None) -> None:
        assert to.shape == source.shape and to.dtype == source.dtype  # noqa: PT018
        assert to.is_contiguous() and source.is_contiguous()  # noqa: PT018
        if to.numel():
            self._driver.copy(self._queue(lane), to.data_ptr(), source.data_ptr(), to.numel() * to.element_size())

    def write(self, to: Tensor, source: Tensor | float, lane: int | None) -> None:
        with torch.cuda.stream(self._stream(lane)):
            _ = to.copy_(source) if isinstance(source, Tensor) else to.fill_(source)

    def post(self, rank: int, flag: int, value: int, lane: int | None = None) -> None:
        self._driver.write(self._queue(lane), self._address(rank, flag), value)

    def wait(self, flag: int, value: int, lane: int) -> None:
        self._driver.wait(self._raw[lane], self._address(self.rank, flag), value)

    def mark(self, lane: int | None = None) -> torch.cuda.Event:
        event = self._events.pop() if self._events else torch.cuda.Event()
        event.record(self._stream(lane))
        return event

    def after(self, mark: torch.cuda.Event, lane: int | None = None) -> None:
        mark.wait(self._stream(lane))
        self._events.append(mark)  # the wait took note of the event's present record

    def _stream(self, lane: int | None) -> torch.cuda.Stream | None:
        """None is torch's current one, as its functions take it."""
        return None if lane is None else self._streams[lane]

    def _queue(self, lane: int | None) -> int:
        """The driver's name of a stream."""
        return torch.cuda.current_stream().cuda_stream if lane is None else self._raw[lane]

    def _address(self, rank: int, flag: int) -> int:
        assert 0 <= 4 * flag < FLAG_BYTES
        return self._addresses[rank] + 4 * flag


class _Driver:
    """Calls of the CUDA driver: two that torch does not offer as a pair, and a copy to a stream that is not current."""

    AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ, cyclic in 32 bits

    def __init__(self) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        self._write, self._wait = library.cuStreamWriteValue32_v2, library.cuStreamWaitValue32_v2
        self._copy = library.cuMemcpyAsync
        for call in (self._write, self._wait):
            call.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
            call.restype = ctypes.c_int
        self._copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
        self._copy.restype = ctypes.c_int

    def write(self, stream: int, address: int, value: int) -> None:
        self._check(self._write(stream, address, value & 0xFFFFFFFF, 0))

    def wait(self, stream: int, address: int, value: int) -> None:
        self._check(self._wait(stream, address, value & 0xFFFFFFFF, self.AT_LEAST))

    def copy(self, stream: int, to: int, source: int, nbytes: int) -> None:
        self._check(self._copy(to, source, nbytes, stream))

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"CUDA driver error {status} on a copy or a stream memory operation")


def captured(x: Tensor) -> bool:
    """Whether what is done with `x` now goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


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
