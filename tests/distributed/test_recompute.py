"""Recomputed activations: the same losses, gradients, norms, and counts, and every routing decided once.

Against the run without recomputation under the same layout. Matrix products of the same operands give the same bits
here, so the bar is far below that of different layouts: what could differ is the order of additions into a gradient.
"""

import pytest
import torch

from moetrain.moe import kept
from moetrain.moe.balance.switch import SwitchLoss
from moetrain.moe.dispatch.collective import CollectiveDispatch
from moetrain.moe.router import common, softmax
from moetrain.parallel import recompute
from moetrain.testing import run_ranks
from moetrain.testing.ranks import RankFailure
from moetrain.testing.small import SMALL_MODEL
from moetrain.testing.trajectory import compare, record

pytestmark = pytest.mark.distributed
STEPS, BAR = 4, 1e-12
SCOPES = ["balance.switch.scope=global_batch"]  # the scope that remembers earlier micro-batches: a replay would add


def train(documents, run_dir, world, *more, steps=STEPS):
    rows = 8 // (2 * world)
    options = [f"run.dir={run_dir}", "train.precision=fp64", f"train.micro_batch={rows}", *SCOPES, *more]
    return run_ranks(record, world, [*SMALL_MODEL, *documents, *options], steps)[0][0]


@pytest.fixture(scope="module")
def stored(documents, tmp_path_factory):
    where = tmp_path_factory.mktemp("stored")
    return {1: train(documents, where / "1", 1), 2: train(documents, where / "2", 2, "parallel.ep=2")}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recompute_changes_nothing(policy, world, documents, stored, tmp_path):
    run = train(documents, tmp_path, world, f"parallel.recompute={policy}", f"parallel.ep={world}")
    difference = compare(run, stored[world])
    print(policy, world, difference)
    assert max(difference.loss, difference.norm, difference.gradient) < BAR, difference
    for mine, theirs in zip(run, stored[world]):
        counted = [key for key in theirs.row if key.startswith(("moe/", "aux/"))]
        assert counted
        assert all(mine.row[key] == pytest.approx(theirs.row[key], rel=BAR, abs=0) for key in counted)


@pytest.mark.parametrize("dispatch", ["collective", "allgather"])
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recompute_with_rows_in_pieces(policy, dispatch, documents, stored, tmp_path):
    """Graphs of several calls of the experts pass from the recomputed pass to the backward pass."""
    more = [f"parallel.recompute={policy}", "parallel.ep=2", f"dispatch={dispatch}", "dispatch.chunks=3"]
    difference = compare(train(documents, tmp_path, 2, *more, steps=2), stored[2][:2])
    assert max(difference.loss, difference.norm, difference.gradient) < 1e-11, difference


def test_keeping_gathered_parameters_changes_nothing(documents, stored, tmp_path):
    more = ["parallel.reshard_after_forward=false", "parallel.recompute=full", "parallel.ep=2"]
    difference = compare(train(documents, tmp_path, 2, *more, steps=2), stored[2][:2])
    assert max(difference.loss, difference.norm, difference.gradient) < BAR, difference


def test_routing_is_decided_once(documents, stored, tmp_path, monkeypatch):
    """A router that chooses something else when asked again: recomputation must not ask (it would flip)."""
    calls = {"choice": 0, "free": 0, "loss": 0, "counts": 0}
    choose, loss, counts = common.choose, SwitchLoss.on_routing, CollectiveDispatch._exchange_counts

    def fickle(selection_TE, k, context):
        calls["choice"] += 1
        calls["free"] += context.chosen_TK is None
        return choose(selection_TE if context.chosen_TK is None else -selection_TE, k, context)

    def counted(name, fn):
        def call(*args):
            calls[name] += 1
            return fn(*args)

        return call

    def train_and_count(*args):
        return record(*args)[0], dict(calls)

    monkeypatch.setattr(softmax, "choose", fickle)
    monkeypatch.setattr(SwitchLoss, "on_routing", counted("loss", loss))
    monkeypatch.setattr(CollectiveDispatch, "_exchange_counts", counted("counts", counts))
    options = [f"run.dir={tmp_path}", "train.precision=fp64", "train.micro_batch=2", "parallel.ep=2", *SCOPES]
    options += ["parallel.recompute=full"]
    run, seen = run_ranks(train_and_count, 2, [*SMALL_MODEL, *documents, *options], 2)[0]
    difference = compare(run, stored[2][:2])
    assert max(difference.loss, difference.norm, difference.gradient) < BAR, difference
    passes = 2 * 2 * 2  # steps x micro-steps x MoE layers
    assert seen == {"choice": 2 * passes, "free": passes, "loss": passes, "counts": passes}


@pytest.mark.parametrize("fault", ["losses counted twice", "choices made again"])
def test_forgetting_is_noticed(fault, documents, stored, tmp_path, monkeypatch):
    if fault == "losses counted twice":
        monkeypatch.setattr(recompute, "_remember", lambda memories: torch.enable_grad())
    else:
        choose = common.choose
        asked = []

        def flips_when_asked_again(selection_TE, k, context):
            asked.append(None)  # passes come in the order layer 1, 2, then again 2, 1 for each micro-step
            again = (len(asked) - 1) % 4 >= 2
            return choose(selection_TE.roll(1, -1) if again else selection_TE, k, context)

        monkeypatch.setattr(softmax, "choose", flips_when_asked_again)
        plain = kept.Kept.__setattr__
        monkeypatch.setattr(kept.Kept, "__setattr__", lambda self, k, v: plain(self, k, None))
    try:
        run = train(documents, tmp_path, 1, "parallel.recompute=full", steps=2)
    except RankFailure as error:
        if "recomputed" in str(error):  # torch notices when a recomputed tensor has another shape
            return
        raise
    difference = compare(run, stored[1][:2])
    aux = max(abs(a.row["aux/switch"] / b.row["aux/switch"] - 1) for a, b in zip(run, stored[1]))
    assert max(difference.loss, difference.norm, difference.gradient, aux) > 1e-6, f"{fault} went unnoticed"
