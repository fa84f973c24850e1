"""How the benchmarks of kernels time: a clock that only counts what runs stands in for the device."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.unit
TURNS = str(Path(__file__).parents[3] / "kernels" / "benchmarks" / "turns.py")


def test_layers_take_turns_behind_enough_load(monkeypatch):
    """Each gets its own median, of rotated inputs, and the device has been at work for 0.4 s before."""
    turns = SimpleNamespace(**runpy.run_path(TURNS))  # the benchmarks are no package
    clock, calls, timed = [0.0], [], []

    class Event:
        def __init__(self, *args):
            self.at = None

        def record(self):
            self.at = clock[0]
            timed.append(len(calls))

        def elapsed_time(self, end):
            return end.at - self.at

    def run(name, ms):
        def one(i):
            calls.append((name, i))
            clock[0] += ms * (3 if i == 4 else 1)  # one slow round is no median

        return one

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert turns.in_turn([run("limit", 2.0), run("layer", 5.0)], repeats=8) == [2.0, 5.0]
    measured = calls[timed[2] :]  # the first pair of events sizes the load
    assert measured == [(name, i) for i in range(9) for name in ("limit", "layer")]
    load = calls[timed[1] : timed[2]]
    assert {name for name, _ in load} == {"limit"}
    assert 2.0 * len(load) >= turns.LOAD_MS
