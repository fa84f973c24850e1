"""A copy of this rank's tensors in host memory, made while the run goes on, for a checkpoint that is written later.

On CUDA the copy runs on a stream of its own into page-locked memory: it overlaps the next step's forward and backward
pass, which only read what is copied, and `hold_updates` makes the device wait before anything is changed. The memory is
taken once and used again. docs/decisions/030-saving-in-the-background.md says why it is done this way.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from moetrain.checkpoint.tensors import save_planned
from moetrain.checkpoint.writer import Digests, Place, ValuesPlanner, WriterProcess

_ALIGN = 64  # bytes, of each tensor in the arena


class Snapshot:
    """What `take` last copied. live: part -> name -> the tensors it copied from, for their names and global shapes.

    apart: whether a process of its own writes the copy (see writer.py); by default for a GPU.
    """

    def __init__(self, device: torch.device, apart: bool | None = None) -> None:
        self.live: dict[str, dict[str, Tensor]] = {}
        self._apart = device.type == "cuda" if apart is None else apart
        self._writer: WriterProcess | None = None
        self._memory = -1
        self._places: dict[str, dict[str, Place]] = {}
        self._host: dict[str, dict[str, Tensor]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied = torch.cuda.Event() if self._stream else None
        self._waits: list[torch.cuda.Event] = []
        self._held = True
        self._registered = 0

    def prepare(self, live: dict[str, dict[str, Tensor]]) -> None:
        """Take the host memory that these tensors need, unless that has been done. Seconds for tens of gigabytes."""
        if self._apart and not (self._writer and self._writer.alive()) and self._host:
            self._writer = WriterProcess(self._memory, self._places)
        if self._host:
            return
        offset = 0
        for part, tensors in live.items():
            self._places[part] = {}
            for name, tensor in tensors.items():
                local = _local(tensor)
                self._places[part][name] = Place(offset, local.dtype, tuple(local.shape))
                offset += -(-local.nbytes // _ALIGN) * _ALIGN
        self._memory = os.memfd_create("moetrain-snapshot")
        os.ftruncate(self._memory, max(offset, 1))
        memory = mmap.mmap(self._memory, 0)
        self._host = {
            part: {name: place.view(memory) for name, place in of.items()} for part, of in self._places.items()
        }
        if self._stream and offset:
            self._register(torch.frombuffer(memory, dtype=torch.uint8).data_ptr(), offset)
        if self._apart:
            self._writer = WriterProcess(self._memory, self._places)

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

    def write(self, directory: Path, part: str, group: ProcessGroup | None) -> Digests:
        """Write the copies of `part` as `write_tensors` does, by file name the digests known already. See `gather`."""
        found: Digests = {}
        writer = self._writer

        def elsewhere(plan: SavePlan) -> list[WriteResult]:
            assert writer is not None
            results, digests = writer.write(directory, part, plan)
            found.update(digests)
            return results

        planner = ValuesPlanner(self._host[part])
        save_planned(directory, self.live[part], planner, group=group, elsewhere=elsewhere if writer else None)
        return found

    def close(self) -> None:
        """Give the page lock back and end the writer."""
        if self._writer:
            self._writer.close()
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._registered)
            self._registered = 0

    def _register(self, pointer: int, size: int) -> None:
        # Not torch's pinned allocator: it rounds up to a power of two and never gives memory back.
        status = torch.cuda.cudart().cudaHostRegister(pointer, size, 0)
        if int(status) == 0:
            self._registered = pointer


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
