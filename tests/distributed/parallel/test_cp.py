"""Context parallelism changes no number: every method, and its products with dp, HSDP and ep, against one process."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from moetrain import trainer
from moetrain.data.batch import Batch
from moetrain.testing import run_ranks
from moetrain.testing.small import SMALL_MODEL
from moetrain.testing.trajectory import compare, new_trainer, record, whole

pytestmark = pytest.mark.distributed
STEPS, BAR = 5, 1e-9  # scripts/invariance.sh takes 20
LAYOUTS = {
    "cp2 allgather": (2, ["parallel.cp=2"]),
    "cp2 ring ep2": (2, ["parallel.cp=2", "parallel.cp_method=ring", "parallel.ep=2"]),
    "cp2 ulysses": (2, ["parallel.cp=2", "parallel.cp_method=ulysses"]),
    "cp4 allgather ep4": (4, ["parallel.cp=4", "parallel.ep=4"]),
    "cp4 ring": (4, ["parallel.cp=4", "parallel.cp_method=ring"]),
    "cp4 ulysses ep2": (4, ["parallel.cp=4", "parallel.cp_method=ulysses", "parallel.ep=2"]),
    "cp2 dp2": (4, ["parallel.cp=2"]),
    "cp2 dp2 ep4": (4, ["parallel.cp=2", "parallel.cp_method=ring", "parallel.ep=4"]),
    "cp2 dp2 replicated ep2": (4, ["parallel.cp=2", "parallel.dp_replicate=2", "parallel.ep=2"]),
}
MLA = {
    "kind": "mla",
    "n_kv_heads": 4,
    "qk_norm": "none",
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
MLA = [f"model.attention.{key}={value}" for key, value in MLA.items()]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Documents longer than several rows among very short ones, so that some rows hold one and others a dozen."""
    directory, rng = tmp_path_factory.mktemp("documents"), random.Random(0)
    lines = []
    for _ in range(150):
        letters = rng.randint(60, 300) if rng.random() < 0.2 else rng.randint(1, 12)
        lines.append(json.dumps({"text": "".join(rng.choices("abcdefgh ", k=letters - 1)) + "."}))
    (directory / "documents.jsonl").write_text("\n".join(lines) + "\n")
    path = directory / "documents.jsonl"
    return ["data=jsonl", f"data.sources.jsonl.path={path}", f"data.cache_dir={directory / 'cache'}"]


def overrides(documents, run_dir, *more, dp=1):
    # Two micro-steps everywhere, of the same rows under every layout.
    options = [f"run.dir={run_dir}", "train.precision=fp64", f"train.micro_batch={4 // dp}"]
    return [*SMALL_MODEL, *documents, *options, *more]


def alone(options, steps):
    return run_ranks(record, 1, options, steps)[0]


@pytest.fixture(scope="module")
def single(documents, tmp_path_factory):
    return alone(overrides(documents, tmp_path_factory.mktemp("single")), STEPS)


def assert_equal(run, reference):
    difference = compare(run, reference)
    print(difference)
    assert max(difference.loss, difference.norm, difference.gradient) < BAR, difference
    for mine, theirs in zip(run, reference):
        exact = [key for key in theirs.row if key == "tokens" or (key.startswith("moe/") and "entropy" not in key)]
        assert len(exact) > 1
        assert all(mine.row[key] == theirs.row[key] for key in exact), "a token was counted twice or a choice flipped"


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process(name, documents, single, tmp_path):
    world, degrees = LAYOUTS[name]
    dp = 2 if "dp2" in name else 1
    run, weights = run_ranks(record, world, overrides(documents, tmp_path, *degrees, dp=dp), STEPS)[0]
    assert_equal(run, single[0])
    for key, weight in single[1].items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=BAR)


@pytest.mark.parametrize(
    ("degrees", "more"),
    [
        (["parallel.cp=2"], ["balance.switch.scope=micro_batch"]),
        (["parallel.cp=2"], ["balance.switch.scope=global_batch"]),
        (["parallel.cp=2", "parallel.cp_method=ring"], ["data.documents=cross"]),
        (["parallel.cp=2", "parallel.cp_method=ulysses"], ["data.documents=cross", *MLA]),
    ],
    ids=["micro_batch", "global_batch", "cross ring", "cross ulysses mla"],
)
def test_other_models_and_scopes(degrees, more, documents, tmp_path):
    """On two data ranks, each with two cp ranks."""
    reference, _ = alone(overrides(documents, tmp_path / "single", *more), 3)
    run, _ = run_ranks(record, 4, overrides(documents, tmp_path / "run", *degrees, *more, dp=2), 3)[0]
    assert_equal(run, reference)


@pytest.mark.parametrize("fault", ["positions counted locally", "balance of half rows", "half rows swapped"])
def test_a_fault_is_noticed(fault, documents, single, tmp_path, monkeypatch):
    take = Batch.take
    if fault == "positions counted locally":

        def local(self, place_S):
            cut = take(self, place_S)
            cut.position_BS.copy_(torch.arange(len(place_S)))
            return cut

        monkeypatch.setattr(Batch, "take", local)
    elif fault == "balance of half rows":
        build = trainer.build_meshes
        monkeypatch.setattr(trainer, "build_meshes", lambda *a: replace(build(*a), row=None))
    else:
        monkeypatch.setattr(Batch, "take", lambda self, place_S: take(self, place_S.roll(len(place_S) // 2)))
    run, _ = run_ranks(record, 2, overrides(documents, tmp_path, "parallel.cp=2"), 2)[0]
    difference = compare(run, single[0][:2])
    assert max(difference.loss, difference.norm, difference.gradient) > 1e-6, f"{fault} went unnoticed: {difference}"


def fit(options):
    run = new_trainer(options)
    run.fit()
    weights = {name: whole(parameter) for name, parameter in run.model.named_parameters()}
    run.close()
    return weights


def test_held_out_loss_samples_and_a_resume_under_another_layout(documents, tmp_path):
    """Four steps of one process; two under cp2 dp2, two more under cp4 from its checkpoint. The last held-out batch is
    part padding."""
    more = ["train.eval_every=2", "train.eval_batches=3", "run.log_samples=true", "data.validation_percent=20"]
    more += ["train.steps=4", "checkpoint.every=2"]
    single = run_ranks(fit, 1, overrides(documents, tmp_path / "single", *more))[0]
    first = overrides(documents, tmp_path / "run", *more, "parallel.cp=2", "parallel.ep=2", dp=2)
    run_ranks(halfway, 4, first)
    then = overrides(documents, tmp_path / "run", *more, "parallel.cp=4", "parallel.cp_method=ring")
    weights = run_ranks(fit, 4, then)[0]
    for key, weight in single.items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=BAR)
    expected, rows = read(tmp_path / "single", "metrics.jsonl"), read(tmp_path / "run", "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [0, 1, 2, 3, 4]
    for mine, theirs in zip(rows, expected):
        for key in theirs.keys() & {"loss", "grad_norm", "val_loss", "tokens"}:
            assert abs(mine[key] / theirs[key] - 1) < BAR, (key, mine, theirs)
    assert sum("val_loss" in row for row in expected) == 3
    samples = read(tmp_path / "run", "samples.jsonl")
    assert [(row["step"], row["dp"]) for row in samples] == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (4, 0)]
    for step, theirs in enumerate(read(tmp_path / "single", "samples.jsonl"), start=1):
        mine = [name for row in samples if row["step"] == step for name in row["ids"]]
        assert sorted(mine) == sorted(theirs["ids"])
        assert len(mine) == 8


def halfway(options):
    """Stop after step 2 as if asked to: the rest of the schedule stays what it was."""
    run = new_trainer(options)
    step = run.train_step
    run.train_step = lambda stop=False: step(run.step == 1)
    run.fit()
    run.close()


def read(run_dir, name):
    rows = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    return [row for row in rows if "event" not in row]
