"""Write and read checkpoint tensors one at a time, so that converting a model never holds all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from moetrain.checkpoint.tensors import read_metadata, read_tensors, save_planned


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that `make` makes when it is its turn to be written. shape and dtype are known before."""

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]


def in_memory(tensor: Tensor) -> LazyTensor:
    """A tensor that is there already."""
    return LazyTensor(tensor.shape, tensor.dtype, lambda: tensor)


def write_lazy(directory: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write one folder, tensor by tensor; the ranks share the tensors out. Every rank calls it with the same names.

    Raises RuntimeError on all ranks if one fails.
    """
    empty = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    save_planned(directory, empty, _Planner(tensors), file_each=True)


def stored(directory: Path) -> dict[str, LazyTensor]:
    """The tensors of one folder by global name, each read whole, on the CPU, when this rank makes it."""
    entries: dict[str, Any] = read_metadata(directory).state_dict_metadata
    found = {}
    for name, entry in sorted(entries.items()):
        assert isinstance(entry, TensorStorageMetadata)
        shape, dtype = entry.size, entry.properties.dtype
        found[name] = LazyTensor(shape, dtype, _reader(directory, name, shape, dtype))
    return found


def _reader(directory: Path, name: str, shape: torch.Size, dtype: torch.dtype) -> Callable[[], Tensor]:
    def make() -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        read_tensors(directory, {name: tensor}, alone=True)
        return tensor

    return make


class _Planner(dcp.DefaultSavePlanner):
    """Plans with empty tensors and looks the real one up when it is written."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors = tensors

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        lazy = self._tensors[index.fqn]
        tensor = lazy.make()
        assert (tensor.shape, tensor.dtype) == (lazy.shape, lazy.dtype), f"{index.fqn} is not what was planned"
        return tensor
