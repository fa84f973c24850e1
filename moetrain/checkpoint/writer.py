"""A process beside a rank that writes its snapshots, so that writing takes nothing from the interpreter that trains.

A thread will not do for that: every small write and hash takes the interpreter's lock, thousands of times for a
checkpoint, from a training loop that needs it to launch kernels. The process shares the snapshot's memory, gets a
list of what to write where, and answers with what DCP's index needs and with the files' digests. It has no device and
no process group, and it ends with its rank.
"""

from __future__ import annotations

import mmap
import multiprocessing as mp
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from moetrain.checkpoint import manifest
from moetrain.comm.parent import die_with_parent

Digests = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the shared memory. offset: bytes."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def view(self, memory: mmap.mmap) -> Tensor:
        """The tensor there, with a storage of its own: torch.save writes whole storages."""
        shape = torch.Size(self.shape)
        if shape.numel() == 0:
            return torch.empty(shape, dtype=self.dtype)
        return torch.frombuffer(memory, dtype=self.dtype, count=shape.numel(), offset=self.offset).view(shape)


class ValuesPlanner(dcp.DefaultSavePlanner):
    """Plans with the tensors it is given, of which it reads no value, and writes `values`, by name."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._values = values

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._values[index.fqn]


class WriterProcess:
    """One rank's writer. memory: descriptor of the shared memory. places: part -> name -> where it lies there.

    Create it in the main thread: the process ends with the thread that started it.
    """

    def __init__(self, memory: int, places: dict[str, dict[str, Place]]) -> None:
        self._pipe, theirs = mp.Pipe()
        command = [sys.executable, "-m", "moetrain.checkpoint.writer", str(memory), str(theirs.fileno())]
        self._process = subprocess.Popen(
            [*command, str(os.getpid())],
            pass_fds=(memory, theirs.fileno()),
            start_new_session=True,  # a launcher signals a rank's whole group, and the last save is written after that
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self._pipe.send(places)

    def alive(self) -> bool:
        return self._process.poll() is None

    def write(self, directory: Path, part: str, plan: dcp.SavePlan) -> tuple[list[WriteResult], Digests]:
        """Write this rank's share of `part` and fsync it; digests go by file name. Raises RuntimeError."""
        try:
            self._pipe.send((directory, part, plan))
            results, digests, error = self._pipe.recv()  # from our own process
        except (EOFError, OSError):
            raise RuntimeError(f"the process that writes checkpoints has ended ({self._process.poll()})") from None
        if error:
            raise RuntimeError(error)
        return results, digests

    def close(self) -> None:
        """End the process; what it was writing is left unfinished."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()


def _write(job: tuple[Path, str, dcp.SavePlan], values: dict[str, dict[str, Tensor]]) -> tuple[Any, Digests, str]:
    directory, part, plan = job
    try:
        writer = dcp.FileSystemWriter(directory)
        results = writer.write_data(plan, ValuesPlanner(values[part])).value()
        files = {result.storage_data.relative_path for result in results}
        return results, {name: manifest.digest(directory / name) for name in files}, ""
    except Exception as error:
        return [], {}, f"{type(error).__name__}: {error}"


def main() -> None:
    """The process: shared memory's descriptor, the pipe's, and the rank's pid are its arguments."""
    memory_fd, pipe_fd, parent = map(int, sys.argv[1:])
    die_with_parent(parent)
    os.nice(10)
    memory = mmap.mmap(memory_fd, 0)
    pipe: Connection = Connection(pipe_fd)
    try:
        places: dict[str, dict[str, Place]] = pipe.recv()
        values = {part: {name: place.view(memory) for name, place in of.items()} for part, of in places.items()}
        while True:
            pipe.send(_write(pipe.recv(), values))
    except (EOFError, OSError):
        return


if __name__ == "__main__":
    main()
