"""One process: what is restored, and what is refused before anything is changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from moetrain.checkpoint import manifest
from moetrain.checkpoint.resume import begin
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.tensors import read_metadata
from moetrain.checkpoint.use import load_weights, read_trainer_state, resolve
from moetrain.optim import adamw
from moetrain.testing.checkpoints import TRAINER_STATE, TiedModel, equal, save_trained, state_of, train_on, trained

pytestmark = pytest.mark.unit


def test_restores_every_bit_and_training_goes_on_as_if_never_stopped(tmp_path):
    path, pair = save_trained(tmp_path)
    assert path == tmp_path / "checkpoints" / "step_00000002"
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "model", "optim", "trainer.json"]
    other = trained(seed=1, steps=5)
    assert not equal(state_of(*pair), state_of(*other))
    assert CheckpointStore(tmp_path).load(path, *other) == TRAINER_STATE == read_trainer_state(path)
    assert equal(state_of(*pair), state_of(*other))
    for model, optimizer in (pair, other):
        train_on(model, optimizer, 2)
    assert equal(state_of(*pair), state_of(*other))


def test_names_are_those_of_the_parameters_and_nothing_is_pickled_beside(tmp_path):
    path, _ = save_trained(tmp_path)
    model = read_metadata(path / "model").state_dict_metadata
    assert set(model) == {"embed.weight", "head.weight", "norm.weight", "bias_E"}
    optim = read_metadata(path / "optim").state_dict_metadata
    slots = ("step", "exp_avg", "exp_avg_sq")
    assert set(optim) == {f"{name}.{slot}" for name in ("embed.weight", "norm.weight") for slot in slots}
    assert str(tmp_path).encode() not in (path / "model" / ".metadata").read_bytes()  # no path of this machine


def test_manifest_says_what_it_is(tmp_path):
    path, _ = save_trained(tmp_path)
    held = manifest.read(path)
    assert held["format"] == 2
    assert held["step"] == 2
    assert held["layout"] == {"world": 1}
    assert held["versions"]["torch"] == torch.__version__
    assert held["files"]["trainer.json"]["size"] == (path / "trainer.json").stat().st_size
    assert manifest.problems(path, None) == []


def test_weights_alone_are_cast(tmp_path):
    path, (model, _) = save_trained(tmp_path)
    other = trained(seed=1)[0].double()
    load_weights(path, other)
    assert torch.equal(other.norm.weight, model.norm.weight.double())
    assert torch.equal(other.bias_E, model.bias_E.double())


def test_refuses_other_keys_shapes_and_dtypes_before_it_changes_anything(tmp_path):
    path, _ = save_trained(tmp_path)
    keeper = CheckpointStore(tmp_path)
    for other, expected in [
        (trained(seed=1, width=4), ["embed.weight has shape (5, 3) in the checkpoint and (5, 4) here"]),
        (trained(seed=1, tied=False), ["missing in the checkpoint: head.weight.exp_avg"]),
    ]:
        before = state_of(*other)
        with pytest.raises(ValueError) as error:
            keeper.load(path, *other)
        assert all(line in str(error.value) for line in expected)
        assert equal(before, state_of(*other))
    model = trained(seed=1)[0]
    del model.bias_E
    with pytest.raises(ValueError, match="unexpected in the checkpoint: bias_E"):
        load_weights(path, model)
    wide = TiedModel().double()
    with pytest.raises(ValueError, match=r"norm.weight is torch.float32 in the checkpoint and torch.float64 here"):
        keeper.load(path, wide, adamw.build(wide.named_parameters(), lr=0.1))
    lazy = TiedModel()
    with pytest.raises(ValueError, match=r"unexpected in the checkpoint: embed.weight.exp_avg"):
        keeper.load(path, lazy, torch.optim.AdamW(lazy.parameters()))  # would silently restart its moments


@pytest.mark.parametrize("state", [{1: "a"}, {"a": (1, 2)}, {"a": float("nan")}, {"a": torch.ones(1)}])
def test_refuses_trainer_state_that_json_would_change(tmp_path, state):
    with pytest.raises(ValueError, match="does not survive JSON"):
        CheckpointStore(tmp_path).save(1, *trained(), state, {})
    assert CheckpointStore(tmp_path).latest() is None


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


def test_named_exceptions_may_be_missing_or_unexpected_and_nothing_else(tmp_path):
    path, (saved, _) = save_trained(tmp_path)
    other = trained(seed=1)[0]
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
    wide = TiedModel(width=4)
    with pytest.raises(ValueError, match=r"embed.weight has shape"):
        load_weights(path, wide, ["*"])  # names only

    resumed = trained(seed=1)
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
    path, _ = save_trained(tmp_path / "run")
    assert resolve(tmp_path / "run") == resolve(path) == path
    with pytest.raises(ValueError, match=r"step_00000003 is not a directory; .* has step_00000002"):
        resolve(path.with_name("step_00000003"))
    with pytest.raises(ValueError, match="neither a step directory"):
        resolve(tmp_path)
    shutil.rmtree(path)
    with pytest.raises(ValueError, match="no intact checkpoint"):
        resolve(tmp_path / "run")
    renamed = save_trained(tmp_path / "run")[0].rename(tmp_path / "best")
    assert resolve(renamed) == renamed  # a copy under a name of the user's
    wrong = save_trained(tmp_path / "run")[0]
    wrong = wrong.rename(wrong.with_name("step_00000099"))
    with pytest.raises(ValueError, match="is of step 2, not of step_00000099"):
        resolve(wrong)


def test_a_resume_from_another_run_gives_up_every_step_that_is_here(tmp_path):
    """Else retention would count them, and a resume would return to them behind a damaged step of its own."""
    mine, others = CheckpointStore(tmp_path / "mine"), CheckpointStore(tmp_path / "other")
    save_trained(tmp_path / "mine", step=2)
    path = others.save(3, *trained(steps=3), {**TRAINER_STATE, "step": 3}, {"world": 1})
    pair = trained(steps=0)
    found = begin(str(path), {}, mine, *pair)
    assert found.step == 3
    mine.set_aside_newer(found.keeps)
    assert mine.steps() == []
    mine.save(4, *pair, {**TRAINER_STATE, "step": 4}, {"world": 1})
    assert begin("auto", {}, mine, *pair).keeps == 4
