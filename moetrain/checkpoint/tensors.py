"""Tensors by global name and global shape, through torch.distributed.checkpoint (DCP).

A folder holds shards (`__<rank>_0.distcp`) and `.metadata`, which maps each name to the shards of its global tensor;
so any layout reads what any layout wrote. DCP keeps `.metadata` as a pickle: we read it with an unpickler that knows
only DCP's own record types, and we store nothing but tensors, which torch loads with weights_only.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
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


def read_tensors(directory: Path, tensors: dict[str, Tensor], alone: bool = False) -> None:
    """Overwrite `tensors` in place from one folder. See `mismatches` first.

    Every rank calls it with what it holds, unless `alone`: then this one reads whatever the others do.
    """
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _quiet():
            dcp.load(tensors, storage_reader=_Reader(directory), planner=planner, no_dist=alone)
    except CheckpointException as error:
        raise RuntimeError(f"{directory} was not read: {error}") from error


def mismatches(
    directory: Path, tensors: dict[str, Tensor], same_dtype: bool, elsewhere: Collection[str] = ()
) -> list[str]:
    """A line for each name that one side lacks and for each global shape (and dtype, if asked) that differs.

    elsewhere: names that other ranks hold (pipeline stages), which are no surprise here.
    """
    stored: dict[str, Any] = read_metadata(directory).state_dict_metadata
    lines = [f"missing in the checkpoint: {name}" for name in sorted(tensors.keys() - stored.keys())]
    lines += [
        f"unexpected in the checkpoint: {name}" for name in sorted(stored.keys() - tensors.keys() - set(elsewhere))
    ]
    for name in sorted(tensors.keys() & stored.keys()):
        there, here = stored[name], tensors[name]
        if there.size != here.shape:
            lines.append(f"{name} has shape {tuple(there.size)} in the checkpoint and {tuple(here.shape)} here")
        elif same_dtype and there.properties.dtype != here.dtype:
            lines.append(f"{name} is {there.properties.dtype} in the checkpoint and {here.dtype} here")
    return lines


def read_metadata(directory: Path) -> Metadata:
    """DCP's index of a folder. Raises ValueError for anything in it but records of tensors in files of this folder."""
    path = directory / _METADATA
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
    except ValueError as error:
        raise ValueError(f"{path} is refused: {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"{path} is refused: not a checkpoint's index")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{path} is refused: {name!r} is not a tensor")
    for index, info in metadata.storage_data.items():
        if info.relative_path in ("", ".", "..") or Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"{path} is refused: {index.fqn!r} is stored outside, in {info.relative_path!r}")
    return metadata


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
