"""What the whole proof claims to cover: every axis, every schedule, and every feature, in legal configurations."""

import copy

import pytest
import yaml

from moetrain.config.compose import load_config
from moetrain.config.pipeline import layer_counts, micro_batches
from moetrain.config.validate import validate
from moetrain.mesh.layout import USER_KEYS
from moetrain.testing.layouts import CASES, Case

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    one = load_config(Case(1).overrides([], run_dir, "fp64"))
    made = []
    for case in CASES:  # composing takes half a second, so only once
        config = copy.deepcopy(one)
        for override in case.overrides([], run_dir, "fp64"):
            key, value = override.split("=", 1)
            if key.startswith("parallel.") or key == "train.micro_batch":
                group, name = key.split(".")
                assert hasattr(getattr(config, group), name), key
                setattr(getattr(config, group), name, yaml.safe_load(value))
        made.append(config)
    return made


def test_every_axis_schedule_and_policy_takes_part(configs):
    assert len(CASES) >= 30
    assert len({case.name for case in CASES}) == len(CASES)
    assert max(case.world for case in CASES) == 8
    for axis in USER_KEYS:
        assert any(case.degrees == {axis: 2} for case in CASES), f"{axis} alone"
        assert any(case.degrees.get(axis) == 2 and len(case.degrees) > 2 for case in CASES), f"{axis} with others"
    used = [config.parallel for config in configs]
    assert {p.schedule for p in used} == {"1f1b", "interleaved", "zbv", "dualpipev"}
    assert {p.cp_method for p in used if p.cp > 1} == {"allgather", "ring", "ulysses"}
    assert {p.recompute for p in used} == {"none", "full", "selective"}
    for schedule in ("interleaved", "zbv", "dualpipev"):
        assert any(p.schedule == schedule and p.tp * p.cp * p.ep > 1 for p in used), schedule
    for p, config in zip(used, configs):
        assert p.pp == 1 or len(set(layer_counts(p, config.model.n_layers))) > 1, "a pipeline cut evenly"


@pytest.mark.parametrize(
    "degrees",
    [
        {"pp": 2, "tp": 2, "cp": 2, "ep": 4},
        {"pp": 2, "tp": 2, "ep": 2, "etp": 2},
        {"tp": 2, "cp": 2, "ep": 8},
        {"dp_replicate": 2, "ep": 2},
    ],
    ids=str,
)
def test_the_named_combinations_are_there(degrees):
    named = [case for case in CASES if case.degrees == degrees and not case.extra]
    assert len(named) == 1


def test_every_feature_is_on_under_every_layout(configs):
    for case, config in zip(CASES, configs):
        layout = validate(config, case.world)
        model, train = config.model, config.train
        assert model.moe.d_shared > 0, case.name
        assert model.moe.shared_gate, case.name
        assert model.attention.qk_norm == "head", case.name
        assert config.data.documents == "stop", case.name  # attention stays inside a packed document
        assert set(config.balance) == {"switch", "z_loss", "bias"}, case.name
        assert micro_batches(config, layout) >= 2, f"{case.name}: no accumulation"
        assert train.max_grad_norm > 0, case.name
        assert [model.is_moe(layer) for layer in range(model.n_layers)] == [False, True, True, True, True], case.name


def test_one_process_accumulates_too(tmp_path):
    config = load_config(Case(1).overrides([], tmp_path, "fp64"))
    assert micro_batches(config, validate(config, 1)) == 2


def test_an_old_torch_leaves_out_only_what_it_cannot_run(monkeypatch):
    assert all(case.runs_here for case in CASES)
    monkeypatch.setattr("moetrain.config.pipeline.version", lambda package: "2.11.0+cu130")
    left_out = [case.name for case in CASES if not case.runs_here]
    assert left_out == [case.name for case in CASES if "zbv" in case.name or "dualpipev" in case.name]
