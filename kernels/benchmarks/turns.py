"""Timing as a training step has it: the GPU under load, clocked a tenth lower than at rest, and the host ahead."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

LOAD_MS = 400.0  # of device work in front: power settles within 100, and the host gets ahead as far as its queue allows


def in_turn(runs: list[Callable[[int], object]], repeats: int = 16) -> list[float]:
    """Median milliseconds of each run(i) by device events, one of each in turn, behind LOAD_MS of the first, which the
    host must launch much faster than it runs. i lets the caller rotate inputs."""
    for i in range(3):
        for run in runs:
            run(i)
    rounds = [[(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in runs] for _ in range(repeats + 1)]
    _timed(0, runs[0], rounds[-1][0])
    torch.cuda.synchronize()
    start, end = rounds[-1][0]
    for i in range(int(LOAD_MS / start.elapsed_time(end)) + 1):
        runs[0](i)
    for i, pairs in enumerate(rounds):
        for run, pair in zip(runs, pairs):
            _timed(i, run, pair)
    torch.cuda.synchronize()
    return [statistics.median(start.elapsed_time(end) for start, end in pairs) for pairs in zip(*rounds)]


def _timed(i: int, run: Callable[[int], object], pair: tuple[torch.cuda.Event, torch.cuda.Event]) -> None:
    pair[0].record()
    run(i)
    pair[1].record()
