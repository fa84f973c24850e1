"""Tiles from a counter: every launch gets each tile once, if no two kernels draw from one counter of a plan."""

import random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from moetrain_kernels import compile_check, configs, ws
from moetrain_kernels.launch import Launcher
from moetrain_kernels.plan import COUNTERS

pytestmark = pytest.mark.unit


class Counter:
    """What atomic_add does to one integer."""

    value = 0

    def add(self, counter, n, sem):
        assert counter is self
        self.value += n
        return self.value - n


def launch(counter: Counter, tiles: int, programs: int, order: random.Random) -> list[int]:
    """The tiles computed by a launch whose programs' steps interleave at random, as the producers take them."""
    done, at = [], {pid: pid for pid in range(programs)}
    with mock.patch.object(ws, "gl", SimpleNamespace(atomic_add=counter.add)):
        while at:
            pid = order.choice(list(at))
            if at[pid] < tiles:
                done.append(at[pid])
                at[pid] = ws.take.fn(counter, tiles, programs)
            else:
                del at[pid]
    return sorted(done)


@pytest.mark.parametrize("tiles", [1, 5, 6, 7, 40])
def test_each_launch_gets_every_tile_once(tiles):
    """Whatever the order of programs, and whatever their number, which may differ from launch to launch."""
    order, counter = random.Random(tiles), Counter()
    for programs in (6, 6, 1, 13, 6):
        assert launch(counter, tiles, programs, order) == list(range(tiles))
        assert counter.value % tiles == 0


def test_two_kinds_of_launches_on_one_counter_lose_tiles():
    """Why every kernel of a plan has a counter of its own."""
    order, counter = random.Random(0), Counter()
    launch(counter, 7, 3, order)
    assert launch(counter, 10, 3, order) != list(range(10))


@pytest.fixture
def draws(monkeypatch):
    """(kernel, counter, address of the plan's sizes) of each launch that draws tiles, on Hopper."""
    found = []

    def record(launcher, grid, args, constants, **options):
        if "COUNTER" in constants:
            (sizes,) = (a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.int32 and a.numel() == 6)
            found.append((launcher.kernel.fn.__name__, constants["COUNTER"], sizes.data_ptr()))

    monkeypatch.setattr(Launcher, "__call__", record)
    monkeypatch.setattr(configs, "device_traits", lambda device: (132, 90))
    return found


def test_no_two_kernels_of_a_plan_share_a_counter(draws):
    compile_check.compile_layer(torch.bfloat16, 1024)
    assert [(name, counter) for name, counter, _ in draws] == [
        ("rows_ws_kernel", COUNTERS["up"]),
        ("rows_ws_kernel", COUNTERS["down"]),
        ("down_grad_ws_kernel", COUNTERS["down_grad"]),
        ("rows_ws_kernel", COUNTERS["dx"]),
    ]
    assert sorted(COUNTERS.values()) == [2, 3, 4, 5]


def test_every_piece_has_counters_of_its_own(draws, monkeypatch):
    monkeypatch.setattr(compile_check.pieces, "check", lambda *args: None)
    compile_check.compile_pieces(torch.bfloat16, 1024)
    assert len(draws) == 4
    assert len({(counter, sizes) for _, counter, sizes in draws}) == 4
