"""Experts that move between ranks change no number: every loss, norm, and gradient equals one process (fp64)."""

import pytest
import torch

from moetrain.moe import placement
from moetrain.observe.metrics import MEASURED
from moetrain.optim.build import build_optimizer
from moetrain.parallel import placement as moves
from moetrain.testing import RankFailure, run_ranks
from moetrain.testing.small import SMALL_MODEL
from moetrain.testing.trajectory import flips, open_trainer, record, record_steps, worst

pytestmark = pytest.mark.distributed
STEPS, BAR = 8, 1e-9
ON = ["dispatch.placement.every=2", "dispatch.placement.threshold=1.0"]
EACH_STEP = ["dispatch.placement.every=1", "dispatch.placement.threshold=1.0"]
LAYOUTS = {  # overrides, ranks that read different rows, micro-steps, steps
    "ep4": (["parallel.ep=4"], 4, 1, STEPS),
    "ep2 edp2": (["parallel.ep=2", "dispatch.chunks=2"], 4, 2, 4),
    "ep2 etp2": (["parallel.ep=2", "parallel.etp=2"], 4, 1, 4),
    "ep2 replicated": (["parallel.ep=2", "parallel.dp_replicate=2", "dispatch=allgather"], 4, 1, 4),
    "ep2 pp2": (["parallel.ep=2", "parallel.pp=2"], 2, 2, 4),
    "ep4 tp2 cp2 recomputed": (["parallel.ep=4", "parallel.tp=2", "parallel.cp=2", "parallel.recompute=full"], 1, 1, 4),
}


def overrides(documents, run_dir, *more, micro_batch=8):
    options = [f"run.dir={run_dir}", "train.precision=fp64", f"train.micro_batch={micro_batch}"]
    return [*SMALL_MODEL, *documents, *options, *more]


@pytest.fixture(scope="module")
def single(documents, tmp_path_factory):
    return run_ranks(record, 1, overrides(documents, tmp_path_factory.mktemp("one")), STEPS)[0][0]


@pytest.fixture
def shuffled(monkeypatch):
    """Plans that move nearly every expert each time, whatever the load: a function of counts that all ranks know."""

    def shuffle(count_E, slot_E, ranks):
        return slot_E[torch.randperm(len(slot_E), generator=torch.Generator().manual_seed(int(count_E[0])))]

    monkeypatch.setattr(placement, "swapped", shuffle)


def moved(run):
    return sum(step.row.get("experts_moved", 0) for step in run)


def timeless(row):
    return {key: value for key, value in row.items() if key not in MEASURED}


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process(name, documents, single, tmp_path, shuffled):
    degrees, dp, micro_steps, steps = LAYOUTS[name]
    options = overrides(documents, tmp_path, *ON, *degrees, micro_batch=8 // dp // micro_steps)
    run, _ = run_ranks(record, 4, options, steps)[0]
    assert moved(run) >= 4 * steps  # nearly all of 2 layers' 8 experts, in steps / 2 decisions
    assert worst(run, single) < BAR
    assert flips(run, single) == 0


def evaluated_and_saved(options):
    """Two steps, after which experts have moved, a validation, a checkpoint right behind it, and two more steps; and in
    which order the checkpoint had experts moved, was written, and had its copy to the host waited for."""
    trainer, order = open_trainer(options), []
    steps, _ = record_steps(trainer, 2)
    trainer.evaluate()

    def noted(name, function):
        return lambda *args: order.append(name) or function(*args)

    with pytest.MonkeyPatch.context() as patch:
        for holder, name in ((trainer.placement, "_move"), (trainer.saver, "save"), (trainer.saver, "before_update")):
            patch.setattr(holder, name, noted(name, getattr(holder, name)))
        trainer.save()
    steps += record_steps(trainer, 2)[0]
    trainer.close()
    return steps, order


def test_a_checkpoint_behind_a_validation_whose_gathered_weights_were_kept(documents, single, tmp_path, shuffled):
    more = ["parallel.ep=2", "parallel.reshard_after_forward=false", "train.eval_batches=1"]
    options = overrides(documents, tmp_path, *ON, *more, micro_batch=1)
    run, order = run_ranks(evaluated_and_saved, 4, options)[0]
    assert moved(run)
    assert order == ["_move", "save", "before_update", "_move"]  # a copy under way would take weights of other experts
    assert worst(run, single[:4]) < BAR


def test_muon_follows(documents, tmp_path, shuffled):
    muon = ["optim=muon", "optim.lr=0.003", "optim.iterations=2"]
    alone, _ = run_ranks(record, 1, overrides(documents, tmp_path / "one", *muon), 3)[0]
    options = overrides(documents, tmp_path / "run", *muon, *EACH_STEP, "parallel.ep=2", micro_batch=4)
    run, _ = run_ranks(record, 2, options, 3)[0]
    assert moved(run)
    assert worst(run, alone) < BAR


@pytest.mark.parametrize("fault", ["optimizer state stays", "weights stay", "tokens go where experts were"])
def test_what_does_not_follow_is_noticed(fault, documents, single, tmp_path, shuffled, monkeypatch):
    if fault == "optimizer state stays":
        plain = moves.following  # weight, two moments, weight, two moments
        monkeypatch.setattr(moves, "following", lambda layer, optimizer: plain(layer, optimizer)[::3])
    elif fault == "weights stay":
        monkeypatch.setattr(moves, "exchange_rows", lambda *_: None)
    else:
        monkeypatch.setattr(moves.ExpertPlacement, "_set", lambda self, slot_LE: setattr(self, "slot_LE", slot_LE))
    run, _ = run_ranks(record, 2, overrides(documents, tmp_path, *EACH_STEP, "parallel.ep=2", micro_batch=4), 3)[0]
    assert worst(run, single) > 1e-6, f"{fault}: unnoticed"


def test_state_that_cannot_follow_is_refused(documents, tmp_path, monkeypatch):
    def with_row_norms(optim, named):
        optimizer, schedule = build_optimizer(optim, named)
        for _, parameter in named:
            optimizer.state[parameter]["row_norm"] = torch.zeros(parameter.shape[0])
        return optimizer, schedule

    monkeypatch.setattr("moetrain.trainer.build_optimizer", with_row_norms)
    with pytest.raises(RankFailure, match=r"dispatch\.placement\.every=2: .*'row_norm'.*nearest legal value: 0"):
        run_ranks(record, 2, overrides(documents, tmp_path, *ON, "parallel.ep=2", micro_batch=4), 1)


def test_a_save_changes_nothing_and_any_layout_resumes(documents, single, tmp_path):
    """Straight; saved and interrupted between decisions; resumed alone, and on another ep with placement."""
    here = tmp_path / "broken"
    ep2 = ["parallel.ep=2", "dispatch.placement.every=3", "dispatch.placement.threshold=1.0"]

    def interrupted():
        saving = ["checkpoint.asynchronous=true", "checkpoint.every=1", "checkpoint.keep=0"]
        options = overrides(documents, here, *ep2, *saving, micro_batch=4)
        rows = []
        for pieces in ((4, 1), (2,)):  # decides after 3 and 6
            trainer = open_trainer(options)
            for steps in pieces:
                run, weights = record_steps(trainer, steps)
                trainer.save()
                rows += run
            trainer.saver.wait()
            trainer.close()
        return rows, weights

    straight, weights = run_ranks(record, 2, overrides(documents, tmp_path / "straight", *ep2, micro_batch=4), 7)[0]
    broken, resumed = run_ranks(interrupted, 2)[0]
    assert "experts_moved" in straight[2].row
    assert worst(straight, single) < BAR
    for mine, theirs in zip(broken, straight, strict=True):
        assert timeless(mine.row) == timeless(theirs.row)
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    back = f"run.resume={here / 'checkpoints' / 'step_00000005'}"
    for world, degrees in ((1, []), (4, ["parallel.ep=4", *EACH_STEP])):
        options = overrides(documents, tmp_path / str(world), back, *degrees, micro_batch=8 // world)
        assert worst(run_ranks(record, world, options, 2)[0][0], single[5:7]) < BAR


def test_a_roll_back_goes_back_to_the_checkpoints_placement(documents, tmp_path):
    def run():
        trainer = open_trainer(overrides(documents, tmp_path, *ON, "parallel.ep=2", micro_batch=4))

        def state():
            layers = trainer.moe_layers.values()
            held = [t.clone() for layer in layers for t in moves.following(layer, trainer.optimizer)]
            return [trainer.placement.slot_LE, trainer.placement.count_LE.clone(), *held]

        record_steps(trainer, 3)
        trainer.save()
        before = state()
        record_steps(trainer, 2)
        between = state()
        trainer._roll_back("a test")
        after = state()
        record_steps(trainer, 1)
        trainer.close()
        return before, between, after

    before, between, after = run_ranks(run, 2)[0]
    assert not torch.equal(before[0], between[0])
    assert before[1].dtype == after[1].dtype == torch.int64  # counts of long windows are beyond what floats keep
    assert len(before) == len(after) == 2 + 2 * 6  # weights and two moments of two matrices in two layers
    assert all(torch.equal(x, y) for x, y in zip(before, after))


def test_forced_skew_is_evened_out_and_measured_as_it_is(documents, tmp_path):
    """The metric is derived from counts and the placement; here every rank counts what its experts are given."""
    zipf = ["router=forced", "router.distribution=zipf", "router.exponent=1.0"]
    options = overrides(documents, tmp_path, *zipf, *ON, "parallel.ep=4", "model.moe.n_experts=16", micro_batch=2)

    def run():
        trainer = open_trainer(options)
        given = dict.fromkeys(trainer.moe_layers, 0)

        def counting(number, backend):
            def call(x_TD, expert_TK, *rest):
                given[number] += int(((expert_TK >= 0) & (expert_TK < len(rest[-1]))).sum())
                return backend(x_TD, expert_TK, *rest)

            return call

        for number, layer in trainer.moe_layers.items():
            layer.experts.backend = counting(number, layer.experts.backend)
        rows, counts = [], []
        for _ in range(4):
            given.update(dict.fromkeys(given, 0))
            rows.append(trainer.train_step()[0])
            counts.append(dict(given))
        trainer.close()
        return rows, counts

    ranks = run_ranks(run, 4)
    rows, _ = ranks[0]
    for step, row in enumerate(rows):
        worst_layer = 0.0
        for number in (1, 2):
            counts = [of_rank[step][number] for _, of_rank in ranks]
            ratio = max(counts) * 4 / sum(counts)
            assert row[f"moe/{number}/rank_load_max_over_mean"] == pytest.approx(ratio, rel=1e-12)
            worst_layer = max(worst_layer, ratio)
        assert row["rank_load_max_over_mean"] == pytest.approx(worst_layer, rel=1e-12)
    loads = [row["rank_load_max_over_mean"] for row in rows]
    print(loads)
    assert min(loads[:2]) > 2.5
    assert max(loads[2:]) < 1.4  # the hottest expert alone has 1.2 of a mean rank's load
