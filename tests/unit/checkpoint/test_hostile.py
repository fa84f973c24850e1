"""Whatever stands in a checkpoint's files, reading them runs none of it."""

from __future__ import annotations

import io
import os
import pickle

import pytest
import torch
from torch import nn

from moetrain.checkpoint import manifest, tools
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.tensors import read_metadata
from moetrain.checkpoint.use import load_weights, read_trainer_state, resolve
from moetrain.optim import adamw

pytestmark = pytest.mark.unit
FILES = (
    "manifest.json",
    "trainer.json",
    "model/.metadata",
    "model/__0_0.distcp",
    "optim/.metadata",
    "optim/__0_0.distcp",
)


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _saved(run, step):
    torch.manual_seed(step)
    model = nn.Linear(2, 3)
    optimizer = adamw.build(model.named_parameters(), lr=0.1)
    return CheckpointStore(run).save(step, model, optimizer, {"val_loss": 1.0}, {}), model, optimizer


def _forge(path, files):
    """A manifest that vouches for what the files are now."""
    held = {k: v for k, v in manifest.read(path).items() if k != "sha256"}
    held["files"] |= {name: manifest.digest(path / name) for name in files}
    manifest.write_json(path / "manifest.json", {**held, "sha256": manifest._self_digest(held)})


def _plant(path, name, content):
    """`content` in place of a file, as one who can write a checkpoint would do it: whatever points to it fits."""
    file = path / name
    if name.endswith(".distcp"):  # the index says that every tensor begins here
        metadata = read_metadata(file.parent)
        file.write_bytes(content)
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, len(content)
        (file.parent / ".metadata").write_bytes(pickle.dumps(metadata))
        _forge(path, [name, f"{file.parent.name}/.metadata"])
        return
    file.write_bytes(content)
    if name != "manifest.json":
        _forge(path, [name])


def _read_everything(run, path, tmp_path):
    """Each way to read a checkpoint; returns how many refused."""
    model = nn.Linear(2, 3)
    optimizer = adamw.build(model.named_parameters(), lr=0.1)
    keeper = CheckpointStore(run)
    ways = [
        lambda: keeper.load(path, model, optimizer),
        lambda: load_weights(path, model),
        lambda: read_trainer_state(path),
        lambda: resolve(path),
        keeper.newest_intact,
        lambda: tools.run(["ls", str(run)], lambda _: None),
        lambda: tools.run(["verify", str(run)], lambda _: None),
        lambda: tools.run(["diff", str(path), str(path.with_name("step_00000001"))], lambda _: None),
        lambda: tools.run(["safetensors", str(path), str(tmp_path / "out")], lambda _: None),
        lambda: tools.run(["prune", str(run), "keep=1", "keep_best=1", "dry_run=true"], lambda _: None),
    ]
    refused = 0
    for way in ways:
        try:
            way()
        except Exception:
            refused += 1
    return refused


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("name", FILES)
def test_a_trap_in_any_file_leaves_no_trace(tmp_path, name, form):
    run, sprung = tmp_path / "run", tmp_path / "sprung"
    _saved(run, 1)
    path, _, _ = _saved(run, 2)
    buffer = io.BytesIO()
    if form == "pickle":
        pickle.dump(_Trap(sprung), buffer, protocol=2)  # what torch.load expects
    else:
        torch.save(_Trap(sprung), buffer)
    _plant(path, name, buffer.getvalue())
    assert _read_everything(run, path, tmp_path) > 0
    assert not sprung.exists()
    if form == "pickle":
        pickle.loads(buffer.getvalue())
    else:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert sprung.exists()  # the trap is a working one


def _shorten(info, directory):
    info.length = (directory / info.relative_path).stat().st_size + 1


def _before(info, directory):
    info.offset = -1


def _transformed(info, directory):
    info.transform_descriptors = ["stream.zstd"]


def _pipe(info, directory):
    os.mkfifo(directory / "pipe")
    info.relative_path = "pipe"


def _link(info, directory):
    (directory / "link").symlink_to("/dev/zero")
    info.relative_path = "link"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_shorten, "stored past the"),
        (_before, "stored past the"),
        (_transformed, "stored transformed"),
        (_pipe, "not a regular file"),
        (_link, "not a regular file"),
    ],
)
@pytest.mark.timeout(60)
def test_an_index_points_into_regular_files_only(tmp_path, change, words):
    path, _, _ = _saved(tmp_path, 1)
    metadata = read_metadata(path / "model")
    change(next(iter(metadata.storage_data.values())), path / "model")
    (path / "model" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=words):
        read_metadata(path / "model")


@pytest.mark.timeout(60)
def test_an_index_that_is_a_pipe_is_not_waited_for(tmp_path):
    path, _, _ = _saved(tmp_path, 1)
    (path / "model" / ".metadata").unlink()
    os.mkfifo(path / "model" / ".metadata")
    with pytest.raises(ValueError, match="not a regular file"):
        read_metadata(path / "model")
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest.json is not a regular file"):
        manifest.read(path)


@pytest.mark.parametrize("text", ["[]", "5", '"x"', "[" * 100_000, '{"sha256": 1}', "{}", "\ud800", "NaN"])
def test_a_manifest_of_anything_else_is_refused_by_name(tmp_path, text):
    path, _, _ = _saved(tmp_path, 1)
    (path / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        manifest.read(path)
