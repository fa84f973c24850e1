"""Schedules against values counted by hand and their refusals."""

from __future__ import annotations

import math

import pytest
import torch

from moetrain.optim.schedule import WarmRestarts, WarmupCosine, WarmupStableDecay, set_lr

pytestmark = pytest.mark.unit


def test_cosine_by_hand():
    schedule = WarmupCosine(warmup_steps=4, min_ratio=0.2)
    got = [schedule(step, 8) for step in range(8)]
    # after the warmup a quarter of the half cosine per update: cos(pi/4) = sqrt(1/2), cos(pi/2) = 0, cos(pi) = -1
    half = 0.4 * math.sqrt(0.5)
    expected = [0.25, 0.5, 0.75, 1.0, 0.6 + half, 0.6, 0.6 - half, 0.2]
    assert got == pytest.approx(expected, abs=1e-15)


def test_stable_decay_by_hand():
    linear = WarmupStableDecay(warmup_steps=2, decay_steps=4, min_ratio=0.0)
    assert [linear(step, 9) for step in range(9)] == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0], abs=1e-15)
    root = WarmupStableDecay(warmup_steps=0, decay_steps=4, min_ratio=0.5, shape="sqrt")
    expected = [1, 1, 1 - 0.25, 1 - 0.5 * math.sqrt(0.5), 1 - 0.5 * math.sqrt(0.75), 0.5]
    assert [root(step, 6) for step in range(6)] == pytest.approx(expected, abs=1e-15)
    plateau = WarmupStableDecay(warmup_steps=1, decay_steps=0)
    assert [plateau(step, 3) for step in range(3)] == [1, 1, 1]


def test_warm_restarts_by_hand():
    """Cycles of 4 and 8 updates; in each, two up from 0.2 to the peak, then a half cosine down to 0.2."""
    schedule = WarmRestarts(period=4, multiply=2, warmup_steps=2, start_ratio=0.2, min_ratio=0.2, decay=0.5)
    first = [0.6, 1.0, 0.6, 0.2]
    turns = [0.6 + 0.4 * math.cos(math.pi * i / 6) for i in range(1, 7)]
    second = [0.5 * value for value in (0.6, 1.0, *turns)]
    assert [schedule(step, 20) for step in range(12)] == pytest.approx(first + second, abs=1e-15)
    assert schedule(12, 20) == pytest.approx(0.25 * 0.6)
    plain = WarmRestarts(period=2, min_ratio=0.0)
    assert [plain(step, 5) for step in range(5)] == pytest.approx([0.5, 0, 0.5, 0, 0.5], abs=1e-15)


def test_runs_shorter_than_the_schedule():
    assert [WarmupCosine(warmup_steps=4)(step, 2) for step in range(2)] == [0.25, 0.5]
    short = WarmupStableDecay(warmup_steps=2, decay_steps=4)  # two updates are left to decay in
    assert [short(step, 4) for step in range(4)] == [0.5, 1, 0.5, 0]
    assert [short(step, 1) for step in range(1)] == [0.5]
    assert WarmupCosine(warmup_steps=2)(1, 2) == 1
    assert WarmupCosine(warmup_steps=0, min_ratio=0.1)(0, 1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmupCosine(-1), r"warmup_steps is -1.*nearest legal value is 0"),
        (lambda: WarmupCosine(1, 1.5), r"min_ratio is 1.5.*nearest legal value is 1"),
        (lambda: WarmupCosine(1)(4, 4), r"step is 4.*nearest legal value is 3"),
        (lambda: WarmupCosine(1)(-1, 4), r"step is -1.*nearest legal value is 0"),
        (lambda: WarmRestarts(0), r"period is 0.*nearest legal value is 1"),
        (lambda: WarmRestarts(4, warmup_steps=4), r"warmup_steps is 4.*nearest legal value is 3"),
        (lambda: WarmRestarts(4, multiply=0), r"multiply is 0.*nearest legal value is 1"),
        (lambda: WarmupStableDecay(3, 2, math.nan), r"min_ratio is nan"),
        (lambda: WarmupStableDecay(0, 1, shape="cosine"), r"shape is 'cosine'; legal values are 'linear' and 'sqrt'"),
    ],
)
def test_refuses_impossible_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_set_lr_scales_each_peak():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": peak, "initial_lr": peak} for peak in (2.0, 4.0)]
    optimizer = torch.optim.AdamW(groups)
    set_lr(optimizer, 0.5)
    set_lr(optimizer, 0.25)  # of the peak, not of what was set before
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.0]
