"""Into how many pieces an exchange is cut."""

from types import SimpleNamespace

import pytest
import torch

from moetrain.moe.dispatch import allgather, chunks, collective, copy_engine, two_level
from moetrain.moe.dispatch.chunks import Chunks

pytestmark = pytest.mark.unit
ON_GPU = SimpleNamespace(is_cuda=True, device="cpu")


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
    monkeypatch.setattr(chunks.dist, "all_reduce", lambda *args, **kwargs: None)
    monkeypatch.setattr(chunks.dist, "get_rank", lambda: 1)
    choice = Chunks("any", "auto", (2, 3, 4), None)
    with torch.no_grad():
        assert choice.of(None, ON_GPU, None, None) == 1  # an evaluation before the first step
    assert choice.of(None, ON_GPU, None, None) == 3
