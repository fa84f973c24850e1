"""The order in which the pieces of an exchange are worked on."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from moetrain.moe.dispatch import schedule
from moetrain.moe.dispatch.schedule import in_turn

pytestmark = pytest.mark.unit


def order(pieces, first_stays, ahead):
    done = []
    trip, work = SimpleNamespace(pieces=pieces, first_stays=first_stays, ahead=ahead), SimpleNamespace(beside=True)
    steps = (lambda piece: done.append(f"begin {piece}"), lambda piece: done.append(f"finish {piece}"))

    def last(stay):
        done.append("last")
        stay()

    in_turn(trip, work, torch.device("cpu"), *steps, last)
    return done


def test_pieces_that_hold_up_computation_are_worked_on_as_they_come():
    assert order(2, False, False) == ["begin 0", "finish 0", "begin 1", "finish 1", "last"]
    assert order(3, True, False) == ["begin 0", "begin 1", "finish 1", "begin 2", "finish 2", "last", "finish 0"]


def test_pieces_that_arrive_beside_computation_are_all_begun_first():
    """And the one that stays is finished last, beside which the last sums travel."""
    assert order(3, True, True) == ["begin 0", "begin 1", "begin 2", "finish 1", "finish 2", "last", "finish 0"]


class Stream:
    """Notes what a CUDA stream is told to wait for."""

    def __init__(self, name, done):
        self.name, self.done = name, done

    def wait_stream(self, other):
        self.done.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.done.append(f"{self.name} waits for {event}")

    def record_event(self):
        return f"{self.done[-1]}"


def test_a_stream_beside_waits_for_the_usual_one_which_waits_for_each_piece(monkeypatch):
    """A second half reads what its first half made elsewhere; a first half what was there before the exchange."""
    done: list[str] = []
    usual, side = Stream("usual", done), Stream("side", done)
    current = [usual]

    @contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(schedule, "_side_stream", lambda device: side)
    steps = [lambda piece, what=what: done.append(f"{current[-1].name} {what} {piece}") for what in ("begin", "finish")]
    trip = SimpleNamespace(pieces=4, first_stays=True, ahead=True)
    in_turn(trip, SimpleNamespace(beside=True), torch.device("cuda"), *steps)
    begun = ["side waits for usual", "usual begin 0", "side begin 1", "usual begin 2", "side begin 3"]
    finished = ["usual waits for side begin 1", "usual finish 1", "usual finish 2", "usual waits for side begin 3"]
    assert done == [*begun, *finished, "usual finish 3", "usual finish 0"]
    done.clear()
    in_turn(trip, SimpleNamespace(beside=False), torch.device("cuda"), *steps)
    assert all(line.startswith("usual") and "waits" not in line for line in done)
