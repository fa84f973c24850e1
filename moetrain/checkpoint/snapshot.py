"""A copy of this rank's tensors in host memory, made while the run goes on, for a checkpoint that is written later.

On CUDA the copy runs on a stream of its own into page-locked memory: it overlaps the next step's forward and backward
pass, which only read what is copied, and `hold_updates` makes the device wait before anything is changed. The memory is
taken once and used again. docs/decisions/030-saving-in-the-background.md says why it is done this way.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

_ALIGN = 64  # bytes, of each tensor in the arena


class Snapshot:
    """What `take` last copied. live: part -> name -> the tensors it copied from, for their names and global shapes."""

    def __init__(self, device: torch.device) -> None:
        self.live: dict[str, dict[str, Tensor]] = {}
        self._host: dict[str, dict[str, Tensor]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied = torch.cuda.Event() if self._stream else None
        self._waits: list[torch.cuda.Event] = []
        self._held = True
        self._registered = 0

    def prepare(self, live: dict[str, dict[str, Tensor]]) -> None:
        """Take the host memory that these tensors need, unless that has been done. Seconds for tens of gigabytes."""
        if self._host:
            return
        local = {(part, name): _local(tensor) for part, tensors in live.items() for name, tensor in tensors.items()}
        size = sum(_aligned(tensor.nbytes) for tensor in local.values())
        arena = mmap.mmap(-1, max(size, 1))
        offset = 0
        for (part, name), tensor in local.items():
            self._host.setdefault(part, {})[name] = _view(arena, offset, tensor)
            offset += _aligned(tensor.nbytes)
        if self._stream and size:
            self._register(torch.frombuffer(arena, dtype=torch.uint8).data_ptr(), size)

    def take(self, live: dict[str, dict[str, Tensor]]) -> None:
        """Copy `live` (part -> name -> tensor), always the same names and shapes. Nobody may read the copy before."""
        self.prepare(live)
        self.live = live
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # does nothing without one
            for part, tensors in live.items():
                for name, tensor in tensors.items():
                    self._host[part][name].copy_(_local(tensor), non_blocking=True)
        if self._copied:
            self._copied.record(self._stream)
            self._held = False

    def hold_updates(self) -> None:
        """Let the current stream wait for the copy. The host does not."""
        if self._copied is None or self._held:
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        torch.cuda.current_stream().wait_event(self._copied)
        after.record()
        self._waits, self._held = [before, after], True

    def stall_s(self) -> float:
        """Seconds that the device stood still in `hold_updates`, told once, when the device is that far."""
        if not self._waits or not all(event.query() for event in self._waits):
            return 0.0
        (before, after), self._waits = self._waits, []
        return before.elapsed_time(after) / 1000

    def wait(self) -> None:
        """Block this thread until the copy is whole."""
        if self._copied:
            self._copied.synchronize()

    def planner(self, part: str) -> dcp.SavePlanner:
        """Plans with the live tensors of `part`, of which it reads no value, and writes the copies."""
        return _HostPlanner(self._host[part])

    def close(self) -> None:
        """Give the page lock back."""
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._registered)
            self._registered = 0

    def _register(self, pointer: int, size: int) -> None:
        # Not torch's pinned allocator: it rounds up to a power of two and never gives memory back.
        status = torch.cuda.cudart().cudaHostRegister(pointer, size, 0)
        if int(status) == 0:
            self._registered = pointer


class _HostPlanner(dcp.DefaultSavePlanner):
    def __init__(self, host: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._values = host

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._values[index.fqn]


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _view(arena: Any, offset: int, like: Tensor) -> Tensor:
    """A tensor with a storage of its own at that place: torch.save writes whole storages."""
    if like.numel() == 0:
        return torch.empty(like.shape, dtype=like.dtype)
    return torch.frombuffer(arena, dtype=like.dtype, count=like.numel(), offset=offset).view(like.shape)
