"""One process: what is restored, what is refused, and what a crash leaves behind."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from moetrain.checkpoint import manifest, store
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.use import load_weights, read_trainer_state, resolve
from moetrain.optim import adamw

pytestmark = pytest.mark.unit

STATE = {"cursor": {"epoch": 0, "sample": 12}, "losses": [0.1, 1e-300], "name": "é"}


class _Model(nn.Module):
    def __init__(self, width=3, tied=True):
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.norm = nn.RMSNorm(width)
        self.register_buffer("bias_E", torch.randn(4))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def _trained(seed=0, steps=2, **options):
    torch.manual_seed(seed)
    model = _Model(**options)
    optimizer = adamw.build(model.named_parameters(), lr=0.1)
    _steps(model, optimizer, steps)
    return model, optimizer


def _steps(model, optimizer, steps):
    for step in range(steps):
        torch.manual_seed(1000 + step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def _snapshot(model, optimizer):
    state = {f"model.{k}": v.clone() for k, v in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state.update({f"optim.{name}.{k}": v.clone() for k, v in optimizer.state[parameter].items()})
    return state


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def _save(run, step=2, keep=0, **options):
    pair = _trained(steps=step, **options)
    return CheckpointStore(run, keep).save(step, *pair, STATE, {"world": 1}), pair


def test_restores_every_bit_and_training_goes_on_as_if_never_stopped(tmp_path):
    path, pair = _save(tmp_path)
    assert path == tmp_path / "checkpoints" / "step_00000002"
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "model", "optim", "trainer.json"]
    other = _trained(seed=1, steps=5)
    assert not _equal(_snapshot(*pair), _snapshot(*other))
    assert CheckpointStore(tmp_path).load(path, *other) == STATE == read_trainer_state(path)
    assert _equal(_snapshot(*pair), _snapshot(*other))
    for model, optimizer in (pair, other):
        _steps(model, optimizer, 2)
    assert _equal(_snapshot(*pair), _snapshot(*other))


def test_names_are_those_of_the_parameters_and_nothing_is_pickled_beside(tmp_path):
    path, _ = _save(tmp_path)
    from moetrain.checkpoint.tensors import read_metadata

    model = read_metadata(path / "model").state_dict_metadata
    assert set(model) == {"embed.weight", "head.weight", "norm.weight", "bias_E"}
    optim = read_metadata(path / "optim").state_dict_metadata
    slots = ("step", "exp_avg", "exp_avg_sq")
    assert set(optim) == {f"{name}.{slot}" for name in ("embed.weight", "norm.weight") for slot in slots}
    assert str(tmp_path).encode() not in (path / "model" / ".metadata").read_bytes()  # no path of this machine


def test_manifest_says_what_it_is(tmp_path):
    path, _ = _save(tmp_path)
    held = manifest.read(path)
    assert held["format"] == 2
    assert held["step"] == 2
    assert held["layout"] == {"world": 1}
    assert held["versions"]["torch"] == torch.__version__
    assert held["files"]["trainer.json"]["size"] == (path / "trainer.json").stat().st_size
    assert manifest.problems(path, None) == []


def test_weights_alone_are_cast(tmp_path):
    path, (model, _) = _save(tmp_path)
    other = _trained(seed=1)[0].double()
    load_weights(path, other)
    assert torch.equal(other.norm.weight, model.norm.weight.double())
    assert torch.equal(other.bias_E, model.bias_E.double())


def test_refuses_other_keys_shapes_and_dtypes_before_it_changes_anything(tmp_path):
    path, _ = _save(tmp_path)
    keeper = CheckpointStore(tmp_path)
    for other, expected in [
        (_trained(seed=1, width=4), ["embed.weight has shape (5, 3) in the checkpoint and (5, 4) here"]),
        (_trained(seed=1, tied=False), ["missing in the checkpoint: head.weight.exp_avg"]),
    ]:
        before = _snapshot(*other)
        with pytest.raises(ValueError) as error:
            keeper.load(path, *other)
        assert all(line in str(error.value) for line in expected)
        assert _equal(before, _snapshot(*other))
    model = _trained(seed=1)[0]
    del model.bias_E
    with pytest.raises(ValueError, match="unexpected in the checkpoint: bias_E"):
        load_weights(path, model)
    wide = _Model().double()
    with pytest.raises(ValueError, match=r"norm.weight is torch.float32 in the checkpoint and torch.float64 here"):
        keeper.load(path, wide, adamw.build(wide.named_parameters(), lr=0.1))
    lazy = _Model()
    with pytest.raises(ValueError, match=r"unexpected in the checkpoint: embed.weight.exp_avg"):
        keeper.load(path, lazy, torch.optim.AdamW(lazy.parameters()))  # would silently restart its moments


@pytest.mark.parametrize("state", [{1: "a"}, {"a": (1, 2)}, {"a": float("nan")}, {"a": torch.ones(1)}])
def test_refuses_trainer_state_that_json_would_change(tmp_path, state):
    with pytest.raises(ValueError, match="does not survive JSON"):
        CheckpointStore(tmp_path).save(1, *_trained(), state, {})
    assert CheckpointStore(tmp_path).latest() is None


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
    intact, _ = _save(tmp_path, step=1)
    path, _ = _save(tmp_path, step=2)
    fault(path)
    other = _trained(seed=1)
    before = _snapshot(*other)
    with pytest.raises(ValueError) as error:
        CheckpointStore(tmp_path).load(path, *other)
    assert FAULTS[fault] in str(error.value)
    assert str(error.value).endswith(f"newest other intact step: {intact}")
    assert _equal(before, _snapshot(*other))
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
    _save(tmp_path, step=1)
    path, _ = _save(tmp_path, step=2)
    _edit_manifest(path, format=version)
    keeper = CheckpointStore(tmp_path)
    for call in (
        lambda: keeper.load(path, *_trained(seed=1)),
        lambda: resolve(path),
        lambda: resolve(tmp_path),
        keeper.latest,
        keeper.newest_intact,
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_checkpoint_of_the_first_format_is_migrated():
    """tests/unit/checkpoint/format_1 was written by the code of format 1 (git show 122a79a:moetrain/checkpoint)."""
    path = Path(__file__).parent / "format_1" / "step_00000007"
    assert manifest.read(path)["format"] == 1
    model = nn.Linear(2, 2, bias=False)
    optimizer = adamw.build(model.named_parameters(), lr=0.1)
    state = CheckpointStore(path.parent).load(path, model, optimizer)
    assert state == {"step": 7, "data": {"step": 7}, "val_loss": None} == read_trainer_state(path)
    assert model.weight.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    held = optimizer.state[model.weight]
    assert (held["exp_avg"] == 0.5).all()
    assert held["step"] == 7


def test_a_run_whose_steps_are_all_damaged_does_not_start_again_in_silence(tmp_path):
    for step in (1, 2):
        _flip(_save(tmp_path, step)[0])
    with pytest.raises(ValueError, match=r"no intact step; run.resume=never starts at step 0") as error:
        CheckpointStore(tmp_path).newest_intact()
    assert str(error.value).count("is damaged") == 2
    assert CheckpointStore(tmp_path / "empty").newest_intact() == (None, {})


def test_any_flipped_byte_of_any_file_is_named(tmp_path):
    path, _ = _save(tmp_path)
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


def test_named_exceptions_may_be_missing_or_unexpected_and_nothing_else(tmp_path):
    path, (saved, _) = _save(tmp_path)
    other = _trained(seed=1)[0]
    other.extra = nn.Linear(2, 2)
    del other.norm
    with pytest.raises(ValueError) as error:
        load_weights(path, other, ["extra.bias", "norm.*"])
    assert "missing in the checkpoint: extra.weight" in str(error.value)
    assert "extra.bias" not in str(error.value)
    before, said = other.extra.weight.clone(), []
    load_weights(path, other, ["extra.*", "norm.weight"], note=said.append)
    assert torch.equal(other.extra.weight, before)
    assert torch.equal(other.embed.weight, saved.embed.weight)
    assert "extra.bias, extra.weight, norm.weight" in said[0]
    with pytest.raises(ValueError, match=r"init.allow: 'nrom.\*' matches no name"):
        load_weights(path, other, ["extra.*", "norm.*", "nrom.*"])
    wide = _Model(width=4)
    with pytest.raises(ValueError, match=r"embed.weight has shape"):
        load_weights(path, wide, ["*"])  # names only

    resumed = _trained(seed=1)
    del resumed[0].bias_E
    resumed[0].register_buffer("later_E", torch.ones(4))
    with pytest.raises(ValueError, match="missing in the checkpoint: later_E"):
        CheckpointStore(tmp_path).load(path, *resumed)
    said.clear()
    CheckpointStore(tmp_path).load(path, *resumed, allow=["bias_E", "later_E", "unused"], note=said.append)
    assert torch.equal(resumed[0].later_E, torch.ones(4))
    assert torch.equal(resumed[0].norm.weight, saved.norm.weight)
    assert "bias_E" in said[0]


def test_resolve_names_what_there_is(tmp_path):
    path, _ = _save(tmp_path / "run")
    assert resolve(tmp_path / "run") == resolve(path) == path
    with pytest.raises(ValueError, match=r"step_00000003 is not a directory; .* has step_00000002"):
        resolve(path.with_name("step_00000003"))
    with pytest.raises(ValueError, match="neither a step directory"):
        resolve(tmp_path)
    shutil.rmtree(path)
    with pytest.raises(ValueError, match="no intact checkpoint"):
        resolve(tmp_path / "run")
    renamed = _save(tmp_path / "run")[0].rename(tmp_path / "best")
    assert resolve(renamed) == renamed  # a copy under a name of the user's
    wrong = _save(tmp_path / "run")[0]
    wrong = wrong.rename(wrong.with_name("step_00000099"))
    with pytest.raises(ValueError, match="is of step 2, not of step_00000099"):
        resolve(wrong)


def test_retention_and_superseded_steps(tmp_path):
    for step in (1, 2, 3):
        _save(tmp_path, step, keep=2)
    keeper = CheckpointStore(tmp_path, keep=2)
    assert [p.name for p in keeper.steps()] == ["step_00000002", "step_00000003"]
    (moved,) = keeper.set_aside_newer(2)
    assert moved.startswith("step_00000003.superseded-")
    assert keeper.latest() == keeper.root / "step_00000002"
    _truncate(keeper.steps()[0])
    _save(tmp_path, 4, keep=1)  # damaged ones are not counted, and left for a human to look at
    assert [p.name for p in keeper.steps()] == ["step_00000002", "step_00000004"]
    with pytest.raises(ValueError, match=r"checkpoint.keep is -1; the nearest legal value is 0"):
        CheckpointStore(tmp_path, keep=-1)


def test_saving_a_step_again_replaces_it(tmp_path):
    path, _ = _save(tmp_path)
    pair = _trained(seed=7)
    assert CheckpointStore(tmp_path).save(2, *pair, {"again": True}, {}) == path
    assert read_trainer_state(path) == {"again": True}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def _killed_saving(run, step, monkeypatch, call):
    """Save in a forked child that dies at its call number `call` of rename or fsync, as if by kill -9."""
    child = os.fork()
    if child == 0:
        calls = iter(range(10_000))

        def dying(real):
            return lambda *args, **kwargs: os._exit(9) if next(calls) == call else real(*args, **kwargs)

        monkeypatch.setattr(os, "rename", dying(os.rename))
        monkeypatch.setattr(os, "fsync", dying(os.fsync))
        try:
            CheckpointStore(run, keep=1).save(step, *_trained(steps=step), {"step": step}, {})
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("step", [1, 2], ids=["replacing", "new"])
def test_killed_at_any_moment_leaves_an_intact_step(tmp_path, monkeypatch, step):
    if torch.cuda.is_initialized():
        pytest.skip("forks, and CUDA has started in this process")
    call = 0
    while True:
        run = tmp_path / str(call)
        first, _ = _save(run, step=1)
        died = _killed_saving(run, step, monkeypatch, call)
        keeper = CheckpointStore(run)
        keeper.clean()
        latest = keeper.latest(deep=True)
        assert latest is not None
        assert read_trainer_state(latest) in (STATE, {"step": step})
        assert all(not p.name.startswith(".") for p in first.parent.iterdir())
        if not died:
            break
        call += 1
    assert call > 8  # it did die at each write, sync, and rename
    assert read_trainer_state(latest) == {"step": step}


def test_a_failed_save_says_so_and_leaves_what_was(tmp_path, monkeypatch):
    path, _ = _save(tmp_path, step=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.manifest, "digest", full)
    with pytest.raises(OSError, match="No space left"):
        CheckpointStore(tmp_path).save(2, *_trained(), STATE, {})
    monkeypatch.undo()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert json.loads((path / "trainer.json").read_text()) == STATE
