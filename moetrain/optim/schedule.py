"""Learning-rate schedules: pure functions of the step, so a resumed run needs nothing from the checkpoint.

`schedule(step, total_steps)` is the multiplier of the peak rate for update `step`, counted from 0 to total_steps - 1.
The first update is already above zero, and the last one is at the minimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from moetrain.config.values import require_range


class Schedule(Protocol):
    """What `optim.schedule._target_` must build."""

    def __call__(self, step: int, total_steps: int) -> float: ...


def set_lr(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Set each group's rate to its peak (`initial_lr`, kept by our builders) times `multiplier`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warmup to 1, then half a cosine down to min_ratio (Loshchilov & Hutter 2017, arXiv:1608.03983).

    warmup_steps: updates until the peak; a shorter run ends while warming up. min_ratio: multiplier of the last update,
    in [0, 1]. Raises ValueError for values outside of these.
    """

    warmup_steps: int
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        require_range("warmup_steps", self.warmup_steps, 0, math.inf)
        require_range("min_ratio", self.min_ratio, 0, 1)

    def __call__(self, step: int, total_steps: int) -> float:
        require_range("step", step, 0, total_steps - 1)
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step + 1 - self.warmup_steps) / (total_steps - self.warmup_steps)
        return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warmup to 1, a plateau, and a decay to min_ratio in the last decay_steps (Hu et al. 2024, 2404.06395).

    A run too short for both keeps its warmup and shortens the decay. shape: linear, or sqrt for 1 - sqrt(progress)
    (Hägele et al. 2024, 2405.18392). Stopping earlier or later changes only the decay, so one plateau serves several
    lengths. Raises ValueError like WarmupCosine.
    """

    warmup_steps: int
    decay_steps: int
    min_ratio: float = 0.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        require_range("warmup_steps", self.warmup_steps, 0, math.inf)
        require_range("decay_steps", self.decay_steps, 0, math.inf)
        require_range("min_ratio", self.min_ratio, 0, 1)
        if self.shape not in ("linear", "sqrt"):
            raise ValueError(f"shape is {self.shape!r}; legal values are 'linear' and 'sqrt'")

    def __call__(self, step: int, total_steps: int) -> float:
        require_range("step", step, 0, total_steps - 1)
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        decay_steps = min(self.decay_steps, total_steps - self.warmup_steps)  # a short run has no plateau
        progress = max(0.0, (step + 1 - (total_steps - decay_steps)) / max(1, decay_steps))
        lost = math.sqrt(progress) if self.shape == "sqrt" else progress
        return 1 - (1 - self.min_ratio) * lost


@dataclass(frozen=True)
class WarmRestarts:
    """Cycles of linear warmup to 1 and half a cosine down to min_ratio (SGDR, Loshchilov & Hutter 2017, 1608.03983).

    For training that goes on from a finished run: its rate has to go back up. period: updates of the first cycle;
    multiply: each cycle is so many times as long as the one before; decay: each peak is this times the one before.
    warmup_steps: of every cycle, from start_ratio up; the min_ratio at which the first run ended makes it continuous.
    Raises ValueError for values outside of these.
    """

    period: int
    multiply: int = 1
    warmup_steps: int = 0
    start_ratio: float = 0.0
    min_ratio: float = 0.1
    decay: float = 1.0

    def __post_init__(self) -> None:
        require_range("period", self.period, 1, math.inf)
        require_range("multiply", self.multiply, 1, math.inf)
        require_range("warmup_steps", self.warmup_steps, 0, self.period - 1)
        require_range("start_ratio", self.start_ratio, 0, 1)
        require_range("min_ratio", self.min_ratio, 0, 1)
        require_range("decay", self.decay, 0, 1)

    def __call__(self, step: int, total_steps: int) -> float:
        require_range("step", step, 0, total_steps - 1)
        start, length, peak = 0, self.period, 1.0
        while step >= start + length:
            start, length, peak = start + length, length * self.multiply, peak * self.decay
        done = step - start + 1
        if done <= self.warmup_steps:
            return peak * (self.start_ratio + (1 - self.start_ratio) * done / self.warmup_steps)
        progress = (done - self.warmup_steps) / (length - self.warmup_steps)
        return peak * (self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
