"""A resume with another model, optimizer, or source is refused before a rank starts; what else changed is told."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from moetrain.checkpoint.lazy import in_memory
from moetrain.checkpoint.same import changes, check_resumed, resumed_step
from moetrain.checkpoint.store import CheckpointStore
from moetrain.config.compose import load_config
from moetrain.optim import adamw
from moetrain.train import running

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that began with init.from=dense; the model in it is of no interest here."""
    run, model = tmp_path_factory.mktemp("run"), nn.Linear(1, 1)
    config = asdict(load_config([f"run.dir={run}", "init.from=dense"]))
    optimizer = adamw.build(model.named_parameters(), lr=0.1)
    CheckpointStore(run).save(3, model, optimizer, {"step": 3}, {"world": 1}, config)
    return run


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (  # the same shapes, another function
            ["model.attention.n_heads=4", "model.attention.n_kv_heads=2", "model.attention.head_dim=32"],
            r"model\.attention\.n_heads=4 differs .*step_00000003.*nearest legal value: 8",
        ),
        (["model.attention.rope.theta=500"], r"model\.attention\.rope\.theta=500\.0 differs .*: 10000\.0"),
        (["optim=muon"], r"optim: .*adamw.*not of .*muon.*init\.from="),
        (["init.from=other"], r"init\.from=other would be ignored: .* step_00000003 .* began with dense"),
    ],
)
def test_what_a_resume_may_not_change(run, overrides, message):
    config = load_config([f"run.dir={run}", *overrides])
    with pytest.raises(ValueError, match=message), running(config):
        pass


def test_what_a_resume_may_change_is_told(run):
    config = load_config([f"run.dir={run}", "init.from=./dense", "optim.lr=0.5", "model.name=x", "train.log_every=3"])
    path = resumed_step(config)
    assert path is not None
    check_resumed(config, path)
    assert changes(config, path) == ["changed since step_00000003: optim.lr 0.0004 -> 0.5"]
    fewer = load_config([f"run.dir={run}", "balance=none"])
    assert "balance.switch.coefficient" in changes(fewer, path)[0]
    assert "-> absent" in changes(fewer, path)[0]
    check_resumed(load_config([f"run.dir={run}", "optim=muon", "init.allow=['*']"]), path)
    assert resumed_step(load_config([f"run.dir={run}", "run.resume=never"])) is None


def test_a_path_that_cannot_be_resumed_names_its_key():
    with pytest.raises(ValueError, match=r"run\.resume=latest: .*nearest legal values: auto, never"):
        resumed_step(load_config(["run.resume=latest"]))


def test_weights_alone_are_nothing_to_resume(tmp_path):
    tensors = {"weight": in_memory(torch.zeros(1))}
    CheckpointStore(tmp_path).save_weights(0, tensors, asdict(load_config([])))
    config = load_config([f"run.dir={tmp_path}"])
    path = resumed_step(config)
    assert isinstance(path, Path)
    with pytest.raises(ValueError, match=f"weights alone.*init.from={tmp_path} and another run.dir"):
        check_resumed(config, path)
