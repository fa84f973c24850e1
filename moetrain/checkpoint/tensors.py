"""Tensors by global name and global shape, through torch.distributed.checkpoint (DCP).

A folder holds shards (`__<rank>_0.distcp`) and `.metadata`, which maps each name to the shards of its global tensor;
so any layout reads what any layout wrote. DCP keeps `.metadata` as a pickle: we read it with an unpickler that knows
only DCP's own record types, and we store nothing but tensors, which torch loads with weights_only.
"""

from __future__ import annotations

import os
import pickle
import stat
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

_METADATA = ".metadata"
_ALLOWED = {
    "torch": {"Size"},  # and dtypes, by type
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}


def model_tensors(model: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, sharing memory with the model. keep_vars: the Parameters themselves.

    Raises ValueError for extra state that is not a tensor: it could only be stored as a pickle.
    """
    tensors = {}
    for name, value in model.state_dict(keep_vars=keep_vars).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"model state {name!r} is a {type(value).__name__}; a checkpoint stores tensors only")
        tensors[name.replace("_orig_mod.", "")] = value  # torch.compile's wrapper is not part of a name
    return tensors


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter name>.<slot>` -> tensor, sharing memory with it.

    Hyper-parameters and group numbers are left out: the first come from the configuration, the second depend on the
    layout. Raises ValueError for state that is not a tensor and for parameters that the model does not have.
    """
    names: dict[Tensor, str] = {}
    for name, parameter in model_tensors(model, keep_vars=True).items():
        names.setdefault(parameter, name)  # tied parameters go by their first name
    tensors = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                shape = tuple(parameter.shape)
                raise ValueError(f"the optimizer holds a parameter of shape {shape} that the model does not have")
            for slot, value in optimizer.state.get(parameter, {}).items():
                key = f"{names[parameter]}.{slot}"
                if not isinstance(value, Tensor):
                    raise ValueError(f"optimizer state {key!r} is a {type(value).__name__}, not a tensor")
                tensors[key] = value
    return tensors


def write_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Write and fsync one folder; every rank calls it with what it holds. Raises RuntimeError on all if one fails."""
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    save_planned(directory, tensors, planner)


def save_planned(
    directory: Path,
    tensors: dict[str, Tensor],
    planner: dcp.SavePlanner,
    file_each: bool = False,
    group: dist.ProcessGroup | None = None,
    elsewhere: Callable[[dcp.SavePlan], list[WriteResult]] | None = None,
) -> None:
    """`write_tensors` with a planner of the caller's, which may find a tensor's values elsewhere.

    file_each: a file for each tensor. DCP holds the tensors of a file until the file is complete. group: see `gather`.
    elsewhere: writes this rank's share instead of DCP.
    """
    writer = _Writer(directory, single_file_per_rank=not file_each)
    writer.elsewhere = elsewhere
    try:
        with _quiet():
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:  # a BaseException, whose message is every failing rank's traceback
        causes = "; ".join(f"rank {rank}: {_cause(failure)}" for rank, (failure, _) in sorted(error.failures.items()))
        raise RuntimeError(f"{directory} was not written: {causes}") from error


def read_tensors(directory: Path, tensors: dict[str, Tensor], alone: bool = False, allow: Collection[str] = ()) -> None:
    """Overwrite `tensors` in place from one folder. See `mismatches` first.

    Every rank calls it with what it holds, unless `alone`: then this one reads whatever the others do. allow: patterns
    of names that keep their values if the folder has none for them.
    """
    if allow:
        stored = read_metadata(directory).state_dict_metadata
        tensors = {name: t for name, t in tensors.items() if name in stored or not matches(name, allow)}
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _quiet():
            dcp.load(tensors, storage_reader=_Reader(directory), planner=planner, no_dist=alone)
    except CheckpointException as error:
        raise RuntimeError(f"{directory} was not read: {error}") from error


def mismatches(
    directory: Path,
    tensors: dict[str, Tensor],
    same_dtype: bool,
    elsewhere: Collection[str] = (),
    allow: Collection[str] = (),
) -> tuple[list[str], list[str]]:
    """A line for each name that one side lacks and for each global shape (and dtype, if asked) that differs.

    elsewhere: names that other ranks hold (pipeline stages), which are no surprise here. allow: patterns of names that
    one side may lack. Returns the lines, and the names that `allow` excepted.
    """
    stored: dict[str, Any] = read_metadata(directory).state_dict_metadata
    missing = sorted(tensors.keys() - stored.keys())
    unexpected = sorted(stored.keys() - tensors.keys() - set(elsewhere))
    lines = [f"missing in the checkpoint: {name}" for name in missing if not matches(name, allow)]
    lines += [f"unexpected in the checkpoint: {name}" for name in unexpected if not matches(name, allow)]
    for name in sorted(tensors.keys() & stored.keys()):
        there, here = stored[name], tensors[name]
        if there.size != here.shape:
            lines.append(f"{name} has shape {tuple(there.size)} in the checkpoint and {tuple(here.shape)} here")
        elif same_dtype and there.properties.dtype != here.dtype:
            lines.append(f"{name} is {there.properties.dtype} in the checkpoint and {here.dtype} here")
    return lines, [name for name in missing + unexpected if matches(name, allow)]


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether one of the shell-style patterns is this name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def read_metadata(directory: Path) -> Metadata:
    """DCP's index of a folder. Raises ValueError for anything in it but records of tensors in files of this folder."""
    path = directory / _METADATA
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
        _check_index(directory, metadata)
    except ValueError as error:
        raise ValueError(f"{path} is refused: {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    return metadata


def _check_index(directory: Path, metadata: Any) -> None:
    """Each entry is a tensor, and lies within a regular file of this folder."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("not a checkpoint's index")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{name!r} is not a tensor")
    sizes: dict[str, int] = {}
    for index, info in metadata.storage_data.items():
        name = info.relative_path
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"{index.fqn!r} is stored outside, in {name!r}")
        if name not in sizes:
            status = os.lstat(directory / name)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{index.fqn!r} is stored in {name!r}, which is not a regular file")
            sizes[name] = status.st_size
        if info.offset < 0 or info.length < 0 or info.offset + info.length > sizes[name]:
            raise ValueError(f"{index.fqn!r} is stored past the {sizes[name]} bytes of {name!r}")
        if info.transform_descriptors:
            raise ValueError(f"{index.fqn!r} is stored transformed, by {info.transform_descriptors}")


def _cause(error: BaseException) -> str:
    """The error that began it: torch's zip writer hides a full disk behind an error of its own."""
    chain = [error]
    while (
        cause := chain[-1].__cause__ or (None if chain[-1].__suppress_context__ else chain[-1].__context__)
    ) is not None:
        chain.append(cause)
    told = next((e for e in reversed(chain) if isinstance(e, OSError)), chain[0])
    return f"{type(told).__name__}: {told}"


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _ALLOWED.get(module, ()):
            raise ValueError(f"it would load {module}.{name}, which no index needs")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _Writer(dcp.FileSystemWriter):
    elsewhere: Callable[[dcp.SavePlan], list[WriteResult]] | None = None

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        if self.elsewhere is None:
            return super().write_data(plan, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(self.elsewhere(plan))
        return done

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # the default would store the path of a folder that is about to be renamed


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch.distributed DCP warns that it works in one process, which is what we want there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
