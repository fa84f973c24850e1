"""experts=auto with candidates that are wrong, slow, or broken: what is chosen, what is kept on disk and believed."""

import json
from dataclasses import replace

import pytest
import torch

from moetrain.moe.experts import auto, measure, remember
from moetrain.moe.experts.auto import AutoExperts
from moetrain.moe.experts.base import Undecided, Workload
from moetrain.moe.experts.grouped_mm import GroupedMMExperts
from moetrain.moe.experts.pieces import CallPieces
from moetrain.moe.experts.reference import ReferenceExperts

pytestmark = pytest.mark.unit
LOAD = Workload(tokens=48, top_k=2, n_experts=8, local_experts=4, d_model=16, d_expert=8, precision="fp32")
CPU = torch.device("cpu")
REFERENCE = ReferenceExperts()


def swapped(x, expert, gate, w1, w2):
    return REFERENCE(x, expert, gate.flip(1), w1, w2)


def frozen_gates(x, expert, gate, w1, w2):
    """Right outputs, wrong gradient."""
    return REFERENCE(x, expert, gate.detach() + 0 * gate, w1, w2)


def not_a_number(x, expert, gate, w1, w2):
    return REFERENCE(x, expert, gate, w1, w2) * float("nan")


def leaks_into_idle_experts(x, expert, gate, w1, w2):
    return REFERENCE(x, expert, gate, w1, w2) + 1e-12 * (w1.sum() + w2.sum())


def wrong_with_many_tokens(x, expert, gate, w1, w2):
    """As kernels may be that take other blocks for them."""
    return REFERENCE(x, expert, gate, w1, w2) * (1 + (len(x) > 200))


class InPieces(ReferenceExperts):
    """Right in one call; in pieces, what they make of it."""

    def __init__(self, pieces):
        self.pieces = pieces

    def divide(self, weights, wanted):
        return self.pieces(self, weights, wanted)


class WrongFinish(CallPieces):
    def finish(self, piece, out_MD=None, more=None):
        return super().finish(piece, out_MD, more) * (1 + piece)


class FirstPieceOnly(CallPieces):
    """What a second piece adds to the weights' gradients is lost."""

    def weight_gradients(self, meanwhile=None):
        super().weight_gradients(meanwhile)
        return self.first

    def start_gradients(self, piece, dy_MD, far):
        super().start_gradients(piece, dy_MD, far)
        if piece == 0:
            self.first = [t.clone() for t in self.dw]


def broken(*_):
    raise RuntimeError("no such kernel")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOETRAIN_CACHE", str(tmp_path))
    return tmp_path / "experts"


@pytest.fixture
def clock(monkeypatch):
    """Milliseconds by backend instead of a real clock; notes what was timed."""
    timed = []

    def median_ms(backend, inputs):
        timed.append(backend)
        return {id(REFERENCE): 5.0}.get(id(backend), 1.0)

    monkeypatch.setattr(measure, "median_ms", median_ms)
    return timed


@pytest.mark.parametrize("wrong", [swapped, frozen_gates, not_a_number, leaks_into_idle_experts, broken])
def test_a_wrong_candidate_is_neither_timed_nor_chosen(wrong, clock):
    name, line = AutoExperts({"fast": wrong, "slow": REFERENCE}).decide(LOAD, CPU)
    assert name == "slow"
    assert clock == [REFERENCE]
    assert "fast refused" in line


@pytest.mark.parametrize("wrong", [wrong_with_many_tokens, InPieces(WrongFinish), InPieces(FirstPieceOnly)])
def test_a_candidate_that_is_wrong_in_a_run_only_is_not_chosen(wrong, clock):
    """The check runs as many tokens as choose the run's kernels, and pieces as an exchange does."""
    load = replace(LOAD, tokens=600)
    name, line = AutoExperts({"fast": wrong, "slow": REFERENCE}).decide(load, CPU)
    assert name == "slow"
    assert "fast refused, error" in line


@pytest.mark.parametrize("tokens", [1, 2, 3, 600])
def test_a_right_candidate_passes_in_pieces(tokens, clock):
    load = replace(LOAD, tokens=tokens, n_experts=4)  # all of them are here, so are the tokens
    assert AutoExperts({"fast": InPieces(CallPieces), "slow": REFERENCE}).decide(load, CPU)[0] == "fast"


def test_the_fastest_correct_one_is_chosen(clock):
    backend = AutoExperts({"grouped": GroupedMMExperts(), "slow": REFERENCE})
    name, line = backend.decide(LOAD, CPU)
    assert (name, line) == ("grouped", "grouped (measured: grouped 1.00 ms, slow 5.00 ms)")
    backend.use(name)
    inputs = measure.workload_inputs(LOAD, CPU)
    assert torch.equal(backend(*inputs), GroupedMMExperts()(*inputs))


def test_a_candidate_without_memory_for_the_whole_shape_is_not_chosen(monkeypatch):
    def median_ms(backend, inputs):
        if backend is not REFERENCE:
            raise torch.OutOfMemoryError("no room")
        return 5.0

    monkeypatch.setattr(measure, "median_ms", median_ms)
    name, line = AutoExperts({"grouped": GroupedMMExperts(), "slow": REFERENCE}).decide(LOAD, CPU)
    assert name == "slow"
    assert "grouped not timed, no room" in line


def test_a_second_run_believes_the_first_ones_measurement(clock, monkeypatch):
    candidates = {"grouped": GroupedMMExperts(), "slow": REFERENCE}
    first, _ = AutoExperts(candidates).decide(LOAD, CPU)
    monkeypatch.setattr(measure, "check", broken)
    monkeypatch.setattr(measure, "median_ms", broken)
    again, line = AutoExperts(candidates).decide(LOAD, CPU)
    assert first == again == "grouped"
    assert "measured before" in line


@pytest.mark.parametrize("change", ["load", "device", "torch", "kernels"])
def test_another_shape_device_or_version_is_measured_again(change, clock, monkeypatch):
    candidates = {"grouped": GroupedMMExperts(), "slow": REFERENCE}
    AutoExperts(candidates).decide(LOAD, CPU)
    load = Workload(**{**LOAD.__dict__, "tokens": 50}) if change == "load" else LOAD
    if change != "load":
        versions = auto._versions(CPU)
        monkeypatch.setattr(auto, "_versions", lambda device: {**versions, change: "another"})
    _, line = AutoExperts(candidates).decide(load, CPU)
    assert "(measured:" in line
    assert len(clock) == 4


@pytest.mark.parametrize("damage", ["cut", "empty", "other key", "other names", "no numbers", "not a table"])
def test_a_damaged_file_is_measured_again(damage, cache, clock):
    candidates = {"grouped": GroupedMMExperts(), "slow": REFERENCE}
    AutoExperts(candidates).decide(LOAD, CPU)
    (path,) = cache.glob("*.json")
    stored = json.loads(path.read_text())
    if damage == "other key":
        stored["key"]["torch"] = "0.1"
    if damage == "other names":
        stored["results"]["faster"] = stored["results"].pop("grouped")
    if damage == "no numbers":
        stored["results"]["slow"]["ms"] = "0.1"
    if damage == "not a table":
        stored["results"] = {"grouped": 1, "slow": 2}
    text = json.dumps(stored)
    path.write_text({"cut": text[:40], "empty": ""}.get(damage, text))
    name, line = AutoExperts(candidates).decide(LOAD, CPU)
    assert name == "grouped"
    assert "(measured:" in line
    assert len(clock) == 4


def test_a_wrong_result_on_disk_is_judged_by_its_error(clock):
    """The rule is applied to what is stored, so a stored error above the limit excludes as a fresh one does."""
    candidates = {"grouped": GroupedMMExperts(), "slow": REFERENCE}
    AutoExperts(candidates).decide(LOAD, CPU)
    (path,) = remember.cache_dir().glob("*.json")
    stored = json.loads(path.read_text())
    stored["results"]["grouped"]["error"] = 0.1
    path.write_text(json.dumps(stored))
    assert AutoExperts(candidates).decide(LOAD, CPU)[0] == "slow"


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(cache, clock, monkeypatch):
    cache.parent.joinpath("file").write_text("")
    monkeypatch.setenv("MOETRAIN_CACHE", str(cache.parent / "file"))
    assert AutoExperts({"slow": REFERENCE}).decide(LOAD, CPU)[0] == "slow"


def test_without_a_clock_the_first_correct_one_is_taken(monkeypatch):
    monkeypatch.setattr(measure, "median_ms", broken)
    candidates = {"wrong": swapped, "grouped": GroupedMMExperts(), "slow": REFERENCE}
    assert AutoExperts(candidates).decide(LOAD, CPU, timed=False)[0] == "grouped"


def test_shapes_that_fit_nowhere_while_measuring_leave_the_first_correct_one(monkeypatch):
    monkeypatch.setattr(measure, "median_ms", broken)
    assert AutoExperts({"grouped": GroupedMMExperts(), "slow": REFERENCE}).decide(LOAD, CPU)[0] == "grouped"


def test_none_correct_is_an_error(clock):
    with pytest.raises(RuntimeError, match="no backend agrees with fp64"):
        AutoExperts({"wrong": swapped}).decide(LOAD, CPU)


def test_that_nothing_could_run_is_not_believed_the_next_time(clock, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(measure, "check", broken)
        with pytest.raises(RuntimeError, match="no backend agrees"):
            AutoExperts({"slow": REFERENCE}).decide(LOAD, CPU)
    assert AutoExperts({"slow": REFERENCE}).decide(LOAD, CPU)[0] == "slow"


def test_the_cpu_and_fp64_are_not_measured(monkeypatch):
    for precision, device in (("fp32", "cpu"), ("bf16", "cpu"), ("fp64", "cuda")):
        assert isinstance(auto.build(precision, device, 16, 8), ReferenceExperts)


def test_on_a_gpu_the_choice_stays_open_until_the_shapes_are_known():
    backend = auto.build("bf16", "cuda", 16, 8)
    assert isinstance(backend, Undecided)
    assert list(backend.candidates)[-2:] == ["grouped_mm", "reference"]
    assert isinstance(backend.candidates[backend.name], ReferenceExperts)
    narrow = auto.build("bf16", "cuda", 12, 8)  # rows of 24 bytes, which torch's grouped matmul does not take
    assert "grouped_mm" not in narrow.candidates


def test_what_arrives_is_what_a_dispatcher_delivers():
    x, expert, gate, w1, w2 = measure.workload_inputs(LOAD, CPU)
    assert expert.shape == gate.shape == (x.shape[0], 2)
    assert (expert >= 0).any(1).all()
    assert int(expert.max()) < LOAD.local_experts == w1.shape[0] == w2.shape[0]
    assert LOAD.tokens // 2 < x.shape[0] < LOAD.tokens  # half the experts are elsewhere: 3 of 4 tokens have one here
    state = torch.get_rng_state()
    measure.workload_inputs(LOAD, CPU)
    assert torch.equal(state, torch.get_rng_state())
