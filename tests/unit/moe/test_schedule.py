"""The order in which the pieces of an exchange are worked on."""

from types import SimpleNamespace

import pytest
import torch

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
