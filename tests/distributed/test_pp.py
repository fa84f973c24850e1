"""Pipelines against one process, in fp64: every schedule, uneven stages, tied embeddings, carries, checkpoints."""

import json
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moetrain.moe.router.softmax import SoftmaxTopK
from moetrain.optim.clip import grad_norm
from moetrain.parallel import pp
from moetrain.testing import RankFailure, run_ranks
from moetrain.testing.small import SMALL_MODEL
from moetrain.testing.trajectory import compare, new_trainer, record
from moetrain.trainer import Trainer

pytestmark = pytest.mark.distributed
STEPS, BAR = 20, 1e-9
MODEL = [*SMALL_MODEL, "model.n_layers=4"]
PP2 = "parallel.pp=2"
LAYOUTS = {
    # name: (ranks, rows of a micro-batch, overrides); 20 steps for what combines most, 4 for the rest
    "1f1b": (2, 2, [PP2]),
    "1f1b, uneven": (2, 1, [PP2, "parallel.pp_layers=[1,3]"]),
    "interleaved": (2, 2, [PP2, "parallel.schedule=interleaved"]),
    "zbv": (2, 2, [PP2, "parallel.schedule=zbv"]),
    "dualpipev": (2, 2, [PP2, "parallel.schedule=dualpipev"]),
    "1f1b dp2 ep2": (4, 2, [PP2, "parallel.ep=2"]),
    "zbv dp2 ep2": (4, 1, [PP2, "parallel.ep=2", "parallel.schedule=zbv"]),
    "interleaved dp2, recomputed": (4, 1, [PP2, "parallel.schedule=interleaved", "parallel.recompute=full"]),
    "1f1b HSDP": (4, 1, [PP2, "parallel.dp_replicate=2"]),
    "pp4": (4, 1, ["parallel.pp=4"]),
}
LONG = "zbv dp2 ep2"


class CarryRouter(torch.nn.Module):
    """A router that looks at the scores of the previous MoE layer."""

    def __init__(self, d_model, n_experts, top_k, **_):
        super().__init__()
        self.inner = SoftmaxTopK(d_model, n_experts, top_k)
        self.back = torch.nn.Parameter(torch.empty(d_model, n_experts))
        self.carry_width = n_experts

    def forward(self, x_TD, context, bias_E=None, carry=None):
        if carry is not None:
            x_TD = x_TD + F.linear(carry, self.back)
        routing = self.inner(x_TD, context, bias_E)
        return replace(routing, carry=routing.logit_TE)


def train(documents, run_dir, world, rows, *more, steps=STEPS):
    options = [f"run.dir={run_dir}", "train.precision=fp64", f"train.micro_batch={rows}"]
    return run_ranks(record, world, [*MODEL, *documents, *options, *more], steps)[0]


@pytest.fixture(scope="module")
def single(documents, tmp_path_factory):
    return train(documents, tmp_path_factory.mktemp("single"), 1, 4)


def assert_equal(run, reference):
    difference = compare(run, reference)
    print(difference)
    assert max(difference.loss, difference.norm, difference.gradient) < BAR, difference
    for mine, theirs in zip(run, reference):
        of_ranks = {key for key in mine.row if key.endswith("rank_load_max_over_mean")}  # nothing to tell without ep
        assert mine.row.keys() - of_ranks == theirs.row.keys()
        counted = [key for key in theirs.row if key.startswith(("moe/", "aux/"))]
        assert counted
        assert all(mine.row[key] == pytest.approx(theirs.row[key], rel=BAR, abs=0) for key in counted)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_pipeline_changes_nothing(name, documents, single, tmp_path):
    world, rows, degrees = LAYOUTS[name]
    steps = STEPS if name == LONG else 4
    run, weights = train(documents, tmp_path, world, rows, *degrees, steps=steps)
    assert_equal(run, single[0][:steps])
    assert weights.keys() == single[1].keys()
    for key, weight in single[1].items() if steps == STEPS else ():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=BAR)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])  # two ranks hold the embedding, or one holds it twice
def test_tied_embeddings(schedule, documents, tmp_path):
    tied = "model.tie_embeddings=true"
    alone, _ = train(documents, tmp_path / "single", 1, 4, tied, steps=4)
    run, _ = train(documents, tmp_path / "run", 2, 2, tied, PP2, f"parallel.schedule={schedule}", steps=4)
    assert_equal(run, alone)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_a_routers_carry_crosses_stages(schedule, documents, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "carry_router", types.SimpleNamespace(CarryRouter=CarryRouter))
    router = "router._target_=carry_router.CarryRouter"
    alone, _ = train(documents, tmp_path / "single", 1, 4, router, steps=3)
    assert alone[0].gradients["layers.2.moe.router.back"].abs().max() > 0
    run, _ = train(documents, tmp_path / "run", 2, 2, router, PP2, f"parallel.schedule={schedule}", steps=3)
    assert_equal(run, alone)


def test_every_stage_is_called_with_an_argument(documents, tmp_path, monkeypatch):
    """On a GPU, FSDP of torch 2.11 takes the first one; the first stage receives none."""
    forward = pp.Stage.forward

    def checked(self, *received):
        assert len(received) > 0
        return forward(self, *received)

    monkeypatch.setattr(pp.Stage, "forward", checked)
    train(documents, tmp_path / "run", 2, 2, PP2, steps=1)


@pytest.mark.parametrize("fault", ["gradients scaled", "tied gradients apart", "norm of one stage"])
def test_a_broken_reduction_is_noticed(fault, documents, single, tmp_path, monkeypatch):
    more, reference = [PP2], single[0][:2]
    if fault == "gradients scaled":
        plain = pp.Schedule1F1B
        scaled = type(
            "Scaled", (plain,), {"__init__": lambda s, *a, **k: plain.__init__(s, *a, **{**k, "scale_grads": True})}
        )
        monkeypatch.setattr(pp, "Schedule1F1B", scaled)
        monkeypatch.setitem(pp.SCHEDULES, "1f1b", scaled)
    elif fault == "tied gradients apart":
        more.append("model.tie_embeddings=true")
        monkeypatch.setattr(pp._TiedEmbedding, "sum_gradients", lambda self: None)
    else:
        monkeypatch.setattr(Trainer, "_grad_norm", lambda self: grad_norm(self.parameters))
    if fault == "tied gradients apart":  # noticed at once: two ranks hold different copies of one gradient
        with pytest.raises(RankFailure, match=r"ranks differ in embed\.weight"):
            train(documents, tmp_path / "run", 2, 2, *more, steps=2)
        return
    run, _ = train(documents, tmp_path / "run", 2, 2, *more, steps=2)
    difference = compare(run, reference)
    assert max(difference.loss, difference.norm, difference.gradient) > 1e-6, f"{fault} went unnoticed: {difference}"


def fit(overrides):
    trainer = new_trainer(overrides)
    try:
        trainer.fit()
    finally:
        trainer.close()


def rows_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss", "grad_norm", "val_loss", "aux/switch")
    return {
        row["step"]: {key: row[key] for key in kept if key in row} for row in lines if "step" in row and "loss" in row
    }


def test_any_layout_continues_a_pipeline(documents, tmp_path):
    """Evaluation, checkpoints by global names, and samples: a pipeline's run, continued by others from its step 2."""
    common = [*MODEL, *documents, "train.precision=fp64", "train.micro_batch=2", "train.steps=4", "train.eval_every=1"]
    common += ["checkpoint.every=2", "checkpoint.keep=0", "run.log_samples=true", "model.tie_embeddings=true"]
    zbv = [PP2, "parallel.schedule=zbv"]
    run_ranks(fit, 2, [*common, f"run.dir={tmp_path / 'first'}", PP2])
    step2 = tmp_path / "first" / "checkpoints" / "step_00000002"
    expected = rows_of(tmp_path / "first")
    for name, world, degrees in (("single", 1, []), ("zbv", 2, zbv)):
        options = [*common, f"run.dir={tmp_path / name}", f"run.resume={step2}", *degrees]
        run_ranks(fit, world, options)
        rows = rows_of(tmp_path / name)
        assert list(rows) == [3, 4]
        for step, row in rows.items():
            assert row.keys() == expected[step].keys() >= {"val_loss"}
            assert all(row[key] == pytest.approx(expected[step][key], rel=BAR, abs=0) for key in row)
    samples = [json.loads(line) for line in (tmp_path / "first" / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["dp"], len(row["ids"])) for row in samples] == [(step, 0, 8) for step in (1, 2, 3, 4)]
