"""A checkpoint cannot run code: hostile pickles in every file that torch would read as one."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
)

from moetrain.checkpoint import tensors
from moetrain.checkpoint.tensors import model_tensors, optimizer_tensors, read_metadata, read_tensors, write_tensors

pytestmark = pytest.mark.unit


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _folder(path):
    path.mkdir()
    write_tensors(path, {"a": torch.arange(3.0)})
    return path


@pytest.mark.parametrize("where", ["instead", "inside"])
def test_a_trap_in_the_index_is_refused_by_name(tmp_path, where):
    folder = _folder(tmp_path / "model")
    trap = _Trap(tmp_path / "sprung")
    hostile = trap if where == "instead" else Metadata({}, storage_data={}, planner_data=trap)
    (folder / ".metadata").write_bytes(pickle.dumps(hostile))
    with pytest.raises(ValueError, match=r"refused: it would load (posix|os)\.mkdir"):
        read_metadata(folder)
    target = {"a": torch.zeros(3)}
    with pytest.raises((ValueError, RuntimeError)):
        read_tensors(folder, target)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(trap))
    assert (tmp_path / "sprung").exists()  # the trap works where it is loaded


def test_a_trap_in_a_shard_leaves_no_trace(tmp_path):
    folder = _folder(tmp_path / "model")
    metadata = read_metadata(folder)
    shard = folder / "__0_0.distcp"
    torch.save(_Trap(tmp_path / "sprung"), shard)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, shard.stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):
        read_tensors(folder, {"a": torch.zeros(3)})
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("elsewhere", ["../secret", "/etc/passwd", "sub/file", "..", ""])
def test_an_index_may_not_point_outside_its_folder(tmp_path, elsewhere):
    folder = _folder(tmp_path / "model")
    metadata = read_metadata(folder)
    for info in metadata.storage_data.values():
        info.relative_path = elsewhere
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="'a' is stored outside"):
        read_metadata(folder)


def test_an_index_of_pickled_objects_or_of_nothing_is_refused(tmp_path, monkeypatch):
    folder = _folder(tmp_path / "model")
    path = folder / ".metadata"
    path.write_bytes(pickle.dumps(Metadata({"a": BytesStorageMetadata()}, storage_data={MetadataIndex("a"): None})))
    with pytest.raises(ValueError, match="BytesStorageMetadata, which no index needs"):
        read_metadata(folder)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="not a checkpoint's index"):
        read_metadata(folder)
    path.write_bytes(b"\x80\x05garbage")
    with pytest.raises(ValueError, match="is damaged"):
        read_metadata(folder)


def test_every_dtype_and_empty_tensors_come_back(tmp_path):
    held = {
        "bf16": torch.randn(3).bfloat16(),
        "fp64": torch.randn(2, 2, dtype=torch.float64),
        "int": torch.arange(4),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
    }
    (tmp_path / "x").mkdir()
    write_tensors(tmp_path / "x", held)
    read = {name: torch.zeros_like(tensor) for name, tensor in held.items()}
    assert tensors.mismatches(tmp_path / "x", read, same_dtype=True) == ([], [])
    read_tensors(tmp_path / "x", read)
    assert all(torch.equal(held[name], read[name]) for name in held)


def test_only_tensors_with_names_are_stored():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(ValueError, match=r"'0._extra_state' is a dict"):
        model_tensors(nn.Sequential(Extra(1, 1)))
    model = nn.Linear(2, 2)
    stranger = nn.Linear(3, 1, bias=False)
    with pytest.raises(ValueError, match=r"shape \(1, 3\) that the model does not have"):
        optimizer_tensors(model, torch.optim.AdamW(stranger.parameters()))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[model.weight]["note"] = "x"
    with pytest.raises(ValueError, match=r"'weight.note' is a str"):
        optimizer_tensors(model, optimizer)
    compiled = torch.compile(nn.Sequential(model))
    assert set(model_tensors(compiled)) == {"0.weight", "0.bias"}
