"""Into how many pieces an exchange is cut."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moetrain.moe.dispatch import allgather, auto, chunks, collective, copy_engine, two_level
from moetrain.moe.dispatch.chunks import Chunks
from moetrain.moe.dispatch.sliced import SlicedDispatch
from moetrain.testing.fake import fake_routing

pytestmark = pytest.mark.unit
ON_GPU = SimpleNamespace(is_cuda=True, device="cpu")


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "fast", "2"])
def test_what_is_no_count_is_refused_even_where_nothing_moves(count):
    with pytest.raises(ValueError, match=r"dispatch\.chunks=.* is no count of pieces; nearest legal value: auto"):
        auto.build(4, None, None, count)
    with pytest.raises(ValueError, match=r"dispatch\.chunks="):
        Chunks("any", count, (1, 2), None)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (allgather.AllGatherDispatch, 1),
        (collective.CollectiveDispatch, 1),
        (copy_engine.CopyEngineDispatch, 2),
        (two_level.TwoLevelDispatch, 1),
    ],
)
@pytest.mark.usefixtures("deterministic")
def test_no_clock_decides_where_a_run_is_to_repeat_to_the_bit(module, count, monkeypatch):
    monkeypatch.setattr(chunks, "_measure", lambda *args: pytest.fail("looked at a clock"))
    choice = Chunks("any", "auto", module.CHUNKS, None)
    assert choice.of(None, ON_GPU, None, None) == count


def test_else_the_fastest_is_measured(monkeypatch):
    seconds = {2: 3.0, 3: 1.0, 4: 2.0}
    monkeypatch.setattr(chunks, "_measure", lambda run, count, *args: seconds[count])
    monkeypatch.setattr(chunks, "settled", lambda *args: None)
    monkeypatch.setattr(chunks.dist, "all_reduce", lambda *args, **kwargs: None)
    monkeypatch.setattr(chunks.dist, "get_rank", lambda: 1)
    choice = Chunks("any", "auto", (2, 3, 4), None)
    with torch.no_grad():
        assert choice.of(None, ON_GPU, None, [[]]) == 1  # an evaluation before the first step
    assert choice.of(None, ON_GPU, None, [[]]) == 3


def test_slices_of_experts_agree_with_each_other(monkeypatch):
    """Whose ranks are in different groups of the exchange and meet once a piece."""
    slower = {"ep": torch.zeros(2), "etp": torch.tensor([0.0, 9.0])}
    monkeypatch.setattr(chunks.dist, "all_reduce", lambda t, op, group: t.copy_(torch.maximum(t, slower[group])))
    monkeypatch.setattr(chunks.dist, "get_rank", lambda: 1)
    inner = SimpleNamespace(chunks=Chunks("any", "auto", (2, 3), "ep"))
    assert inner.chunks.agree([2.0, 1.0], "cpu") == 3
    SlicedDispatch(inner, "etp")
    assert inner.chunks.agree([2.0, 1.0], "cpu") == 2


@pytest.fixture
def four_ranks(monkeypatch):
    """Of which all have the same tokens."""
    monkeypatch.setattr(chunks.dist, "all_reduce", lambda load, group: load.mul_(4))
    monkeypatch.setattr(chunks.dist, "get_world_size", lambda group: 4)
    monkeypatch.setattr(chunks.dist, "get_rank", lambda group: 1)


@pytest.mark.usefixtures("four_ranks")
def test_it_is_measured_with_the_routing_of_the_run_unless_that_is_lopsided():
    tokens = torch.arange(400)
    even = fake_routing(torch.stack([tokens % 8, (tokens + 3) % 8], dim=1), torch.ones(400, 2))
    assert chunks.settled(even, 2, None) is even
    new = replace(even, expert_TK=torch.stack([tokens % 2, torch.where(tokens < 100, -1, 5)], dim=1))
    settled = chunks.settled(new, 2, None).expert_TK
    assert torch.equal(settled < 0, new.expert_TK < 0)
    assert (settled[:, 0] != settled[:, 1]).all()
    assert torch.bincount(settled[settled >= 0], minlength=8).min() > 50  # of 87.5 on average: 4.3 deviations
    assert chunks.settled(replace(new, bounded=True), 2, None).expert_TK is new.expert_TK
