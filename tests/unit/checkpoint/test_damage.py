"""Whatever is damaged is named, changes nothing, and is passed over for the newest intact step."""

from __future__ import annotations

import os
import random
import shutil

import pytest

from moetrain.checkpoint import manifest
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.use import resolve
from moetrain.testing.checkpoints import equal, save_trained, state_of, trained

pytestmark = pytest.mark.unit


def _truncate(path):
    os.truncate(path / "model" / "__0_0.distcp", 10)


def _flip(path):
    file = path / "optim" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _remove(path):
    (path / "trainer.json").unlink()


def _add(path):
    (path / "model" / "__1_0.distcp").write_bytes(b"x")


def _link(path):
    (path / "model" / "__0_0.distcp").rename(path.parent / "elsewhere")
    (path / "model" / "__0_0.distcp").symlink_to(path.parent / "elsewhere")


def _pipe(path):
    os.mkfifo(path / "optim" / "pipe")


def _manifest_flip(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"world": 1', '"world": 2'))


def _manifest_gone(path):
    (path / "manifest.json").unlink()


def _edit_manifest(path, **changes):
    held = {k: v for k, v in {**manifest.read(path), **changes}.items() if k != "sha256"}
    manifest.write_json(path / "manifest.json", {**held, "sha256": manifest._self_digest(held)})


def _traverse(path):
    (path.parent / "secret").write_text("s")
    files = manifest.read(path)["files"]
    _edit_manifest(path, files={**files, "../secret": manifest.digest(path.parent / "secret")})


def _absolute(path):
    _edit_manifest(path, files={**manifest.read(path)["files"], "/etc/passwd": {"size": 1, "sha256": ""}})


def _types(path):
    _edit_manifest(path, files={"trainer.json": 5})


def _device(path):
    (path / "optim" / "__0_0.distcp").unlink()
    (path / "optim" / "__0_0.distcp").symlink_to("/dev/zero")  # no right to make a node is needed


def _folder_gone(path):
    shutil.rmtree(path)
    path.write_text("not a folder")


def _folder_linked(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def _index_pipe(path):
    (path / "model" / ".metadata").unlink()
    os.mkfifo(path / "model" / ".metadata")


FAULTS = {
    _truncate: "model/__0_0.distcp has 10 bytes instead of",
    _flip: "optim/__0_0.distcp is damaged: its sha256",
    _remove: "trainer.json is missing",
    _add: "model/__1_0.distcp is foreign",
    _link: "model/__0_0.distcp is neither a file nor a folder",
    _pipe: "optim/pipe is neither a file nor a folder",
    _manifest_flip: "does not match its own sha256",
    _manifest_gone: "manifest.json is missing: not a complete checkpoint",
    _traverse: "'../secret', which is outside the checkpoint",
    _absolute: "'/etc/passwd', which is outside the checkpoint",
    _types: "manifest.json is damaged: TypeError",
    _device: "optim/__0_0.distcp is neither a file nor a folder",
    _folder_gone: "step_00000002 is not a folder",
    _folder_linked: "step_00000002 is not a folder",
    _index_pipe: "model/.metadata is neither a file nor a folder",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_names_the_damage_and_offers_the_newest_intact_step(tmp_path, fault):
    intact, _ = save_trained(tmp_path, step=1)
    path, _ = save_trained(tmp_path, step=2)
    fault(path)
    other = trained(seed=1)
    before = state_of(*other)
    with pytest.raises(ValueError) as error:
        CheckpointStore(tmp_path).load(path, *other)
    assert FAULTS[fault] in str(error.value)
    assert str(error.value).endswith(f"newest other intact step: {intact}")
    assert equal(before, state_of(*other))
    assert CheckpointStore(tmp_path).latest(deep=True) == intact
    found, skipped = CheckpointStore(tmp_path).newest_intact()
    assert found == intact
    assert FAULTS[fault] in str(skipped[path.name])
    if fault is _folder_linked:  # a link that the user names is another matter
        assert resolve(path) == tmp_path / "elsewhere"
        return
    if fault is not _flip:  # found by hashing only
        assert resolve(tmp_path) == intact
        with pytest.raises(ValueError, match=r"cannot be used|is not a directory"):
            resolve(path)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (3, "has format 3, of a newer moetrain; this moetrain reads formats 1 to 2"),
        (0, "has format 0; this moetrain reads formats 1 to 2"),
        ("x", "has format 'x'"),
    ],
)
def test_another_format_is_refused_by_name_and_no_older_step_taken_in_its_stead(tmp_path, version, words):
    save_trained(tmp_path, step=1)
    path, _ = save_trained(tmp_path, step=2)
    _edit_manifest(path, format=version)
    keeper = CheckpointStore(tmp_path)
    for call in (
        lambda: keeper.load(path, *trained(seed=1)),
        lambda: resolve(path),
        lambda: resolve(tmp_path),
        keeper.latest,
        keeper.newest_intact,
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_run_whose_steps_are_all_damaged_does_not_start_again_in_silence(tmp_path):
    for step in (1, 2):
        _flip(save_trained(tmp_path, step)[0])
    with pytest.raises(ValueError, match=r"no intact step; run.resume=never starts at step 0") as error:
        CheckpointStore(tmp_path).newest_intact()
    assert str(error.value).count("is damaged") == 2
    assert CheckpointStore(tmp_path / "empty").newest_intact() == (None, {})


def test_any_flipped_byte_of_any_file_is_named(tmp_path):
    path, _ = save_trained(tmp_path)
    rng = random.Random(os.environ.get("MOETRAIN_TEST_SEED", "11"))
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    assert len(files) == 6
    for file in files * 5:
        whole = file.read_bytes()
        data = bytearray(whole)
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[at] ^= bit
        file.write_bytes(data)
        (line,) = manifest.problems(path, None)
        assert str(file) in line, f"byte {at} of {file} xor {bit}"
        with pytest.raises(ValueError, match="no intact step"):
            CheckpointStore(tmp_path).newest_intact()
        file.write_bytes(whole)
    assert manifest.problems(path, None) == []
