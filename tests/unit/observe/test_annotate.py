"""What `moetrain profile` puts around a model's parts must not change what runs."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moetrain.config.compose import load_config
from moetrain.model.build import build_model
from moetrain.moe.dispatch.schedule import in_turn
from moetrain.moe.experts.pieces import CallPieces, divide
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.moe.layer import MoELayer
from moetrain.observe.annotate import annotate
from moetrain.testing.fake import fake_experts, fake_tokens
from moetrain.testing.small import SMALL_MODEL

pytestmark = pytest.mark.unit
T, D, F, E, K = 6, 4, 4, 3, 2


class Noted(CallPieces):
    """Pieces of a backend's own, as those of experts=triton."""

    beside = True

    def start(self, *args):
        with torch.profiler.record_function("own half"):
            super().start(*args)


class Own(ReferenceExperts):
    def divide(self, weights, wanted):
        return Noted(self, weights, wanted)


class Trip:
    pieces, first_stays, ahead = 2, True, True


def passes(backend):
    """y, dx, dgate, dw of two pieces, the way the exchange goes through them; sums made elsewhere come to the first."""
    x, expert, gate, dy = fake_tokens(T, D, E, K, seed=0)
    cut, found = [slice(0, 4), slice(4, 6)], {}
    work = divide(backend, fake_experts(E, D, F), (True,) * 4)
    more = lambda: (dy[None, :4], gate.detach()[None, :4])  # noqa: E731

    def start(i):
        work.start(x.detach()[cut[i]], expert[cut[i]] + 5, gate.detach()[cut[i]], 5, lambda: None)

    def finish(i):
        found["y", i] = work.finish(i, None, more if i == 0 else None)

    def back(i):
        found["dx", i], found["dgate", i] = work.finish_gradients(i, None, more if i == 0 else None)

    in_turn(Trip, work, torch.device("cpu"), start, finish)
    weights = lambda stay: found.update(enumerate(work.weight_gradients(stay)))  # noqa: E731
    in_turn(Trip, work, torch.device("cpu"), lambda i: work.start_gradients(i, dy[cut[i]], True), back, weights)
    return work, found


def annotated(backend):
    model = build_model(load_config(SMALL_MODEL), "cpu")
    layer = next(m for m in model.modules() if isinstance(m, MoELayer))
    layer.experts.backend = backend
    annotate(model)
    return layer.experts.backend


def test_a_backend_that_divides_its_work_still_does():
    plain, want = passes(Own())
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        work, found = passes(annotated(Own()))
    assert work.beside
    assert plain.beside
    assert found.keys() == want.keys()
    assert all(torch.equal(found[key], want[key]) for key in want)
    names = [event.name for event in trace.events()]
    assert names.count("own half") == 2
    assert "moetrain::experts" in names


def test_what_moves_rows_between_two_halves_is_the_dispatchers():
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        passes(annotated(Own()))
    inside = [e for e in trace.events() if e.name == "moetrain::dispatch"]
    assert len(inside) == 2 + 1 + 1 + 1  # rows of two pieces, sums for y, those for dx, and what comes last
    assert all(e.cpu_parent is not None for e in inside)


def test_a_backend_that_is_called_is_called():
    backend = annotated(ReferenceExperts())
    assert isinstance(divide(backend, fake_experts(E, D, F), None), CallPieces)
