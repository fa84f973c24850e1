"""What a run that starts from a checkpoint takes from it, and what it may not contradict."""

from __future__ import annotations

from pathlib import Path

import pytest

from moetrain.checkpoint.store import CheckpointStore
from moetrain.config.compose import load_config
from moetrain.config.inherit import inherit
from moetrain.train import run_config

pytestmark = pytest.mark.unit

STORED = [
    "model=olmoe_1b_7b",
    "model.name=imported",
    "data.tokenizer=/some/tokenizer",
    "router.order=pre",
    "balance=[switch,bias]",
]


def started(*overrides, stored=STORED):
    overrides = [*overrides, "init.from=CKPT"]
    return inherit(load_config(overrides), load_config(stored), overrides, "CKPT")


def test_a_run_that_says_nothing_takes_everything():
    want, got = load_config(STORED), started("train.steps=7", "run.dir=here")
    assert got.model == want.model
    assert (got.router, got.balance) == (want.router, want.balance)
    assert got.data.tokenizer == "/some/tokenizer"
    assert (got.train.steps, got.run.dir) == (7, "here")


def test_a_run_that_says_the_same_is_taken():
    assert started("model=olmoe_1b_7b").model.d_model == 2048
    assert started("model.d_model=2048", "model.init_std=0.1").model.init_std == 0.1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_model=512", r"model\.d_model=512 differs .* init\.from=CKPT; nearest legal value: 2048"),
        ("model.d_model=128", r"model\.d_model=128 differs"),  # the default, but given by name
        ("model.moe.n_experts=0", r"model\.moe\.n_experts=0 differs .* nearest legal value: 64"),
        ("model.attention.rope.theta=5.0", r"model\.attention\.rope\.theta=5\.0 differs"),
        ("model=mixtral_8x7b", r"model\.vocab_size=32000 differs .* nearest legal value: 50304"),
        ("experiment=first_gpu_run", r"differs from the model in init\.from"),
    ],
)
def test_a_run_that_says_otherwise_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        started(override)


def test_routers_balance_and_tokenizer_may_be_chosen_anew():
    got = started("router=sigmoid", "router.scale=2.5", "balance=z_loss", "data.tokenizer=byte")
    assert got.router["_target_"].endswith("SigmoidTopK")
    assert (got.router["scale"], got.router["top_k"]) == (2.5, 8)
    assert got.router["renormalize"] is False  # a property of the weights, unless named
    assert list(got.balance) == ["z_loss"]
    assert got.data.tokenizer == "byte"
    ended = [*STORED, "data.eos_token=stop"]
    assert started(stored=ended).data.eos_token == "stop"
    assert started("data.tokenizer=byte", stored=ended).data.eos_token == ""  # the other tokenizer's
    assert started("router.renormalize=true").router["renormalize"] is True
    assert started("router.record=tape").router["record"] == "tape"
    assert list(started("balance.switch.coefficient=0.5").balance) == ["switch", "z_loss"]


def test_a_dense_checkpoint_leaves_the_router_alone():
    got = started(stored=["model.moe.n_experts=0"])
    assert got.model.moe.n_experts == 0
    assert got.router == load_config([]).router


def test_a_run_to_be_resumed_needs_its_source_no_more(tmp_path, monkeypatch):
    overrides = ["init.from=gone", f"run.dir={tmp_path}"]
    with pytest.raises(ValueError, match="gone is not a directory"):
        run_config(overrides)
    monkeypatch.setattr(CheckpointStore, "latest", lambda self: Path("own"))
    monkeypatch.setattr("moetrain.checkpoint.stored.stored_config", lambda path: load_config(STORED))
    assert run_config(overrides).model.name == "imported"
