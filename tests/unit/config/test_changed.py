"""A resume under another configuration says which of its numbers are computed otherwise."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from moetrain.config.changed import changed
from moetrain.config.compose import load_config
from moetrain.testing import run_ranks
from moetrain.testing.small import SMALLEST_MODEL
from moetrain.testing.trajectory import new_trainer

pytestmark = pytest.mark.unit


def stored(*overrides):
    return json.loads(json.dumps(asdict(load_config(list(overrides)))))


def test_the_same_configuration_says_nothing():
    assert changed(stored(), load_config([])) == []
    other_layout = ["parallel.ep=2", "run.dir=x", "train.log_every=3", "checkpoint.every=5", "experts=reference"]
    assert changed(stored(), load_config(other_layout)) == []


def test_what_differs_is_named_with_both_values():
    lines = changed(
        stored("balance=[switch,z_loss]"), load_config(["model.attention.rope.theta=5e5", "balance=switch"])
    )
    assert lines[0] == "model.attention.rope.theta was 10000.0 in the checkpoint and is 500000.0 now"
    assert [line for line in lines if line.startswith("balance.z_loss.coefficient was 0.001") and "absent" in line]


def test_a_key_that_the_checkpoint_did_not_know_is_passed_over():
    old = stored()
    del old["train"]["max_loss"]
    assert changed(old, load_config(["train.max_loss=7"])) == []


def test_a_resumed_run_notes_it(tmp_path):
    def run():
        options = [*SMALLEST_MODEL, f"run.dir={tmp_path}", "train.steps=1"]
        trainer = new_trainer(options)
        trainer.fit()
        trainer.close()
        again = new_trainer([*options, "router.renormalize=false"])
        notes = again.beginning.notes
        again.close()
        return notes

    assert run_ranks(run, 1) == [["router.renormalize was True in the checkpoint and is False now"]]
